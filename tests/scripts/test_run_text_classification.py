"""The text classification program, from flags to a folder of results."""

import json
import random
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    pipeline,
)

from hf_lookbehind.programs.models import tokenization
from hf_lookbehind.programs.task import Task
from hf_lookbehind.scripts.run_text_classification import main, make_parser, prepare, train
from tests.caches import set_caches

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]
NEW_MODEL = ["--config_overrides", TINY, "--vocab_size", "300"]
GOOD, BAD = ["fine", "lovely", "warm", "kind"], ["dull", "poor", "cold", "rude"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model and its tokenizer after two steps, as the program saves them."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--train_file", table(folder / "data.csv"), *NEW_MODEL, *QUICK, "--max_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        assert main([*flags, "--save_strategy", "no", "--output_dir", str(folder / "model")]) == 0
    return folder / "model"


def sentences(n, kinds=(GOOD, BAD)):
    """Alternately of each kind: a sentence that has its word in it, and its number."""
    draw = random.Random(0)
    filler = "the a day house and then was it we saw".split()
    rows = []
    for i in range(n):
        words = draw.choices(filler, k=3) + [draw.choice(kinds[i % len(kinds)])] + draw.choices(filler, k=2)
        rows.append((" ".join(words), i % len(kinds)))
    return rows


def table(path, n=48, **columns):
    """A file of rows; columns as functions of (text, kind)."""
    columns = columns or {"text": lambda text, kind: text, "label": lambda text, kind: ["bad", "good"][kind]}
    rows = [{name: make(text, kind) for name, make in columns.items()} for text, kind in sentences(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    {".csv": data.to_csv, ".jsonl": data.to_json, ".parquet": data.to_parquet}[path.suffix](path)
    return str(path)


def written(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return ["--train_file", str(path)]


def with_config(folder, model, **changes):
    """A copy of the model with another config."""
    shutil.copytree(model, folder)
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return ["--model_name_or_path", str(folder)]


def without_padding(folder, model):
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


def without_tokenizer(folder, model):
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(model / file, folder)
    return ["--model_name_or_path", str(folder)]


def in_the_way(folder):
    """An output folder in which the user has something of the name that the search would use."""
    (folder / "rho_search_trials" / "mine").mkdir(parents=True)
    return ["--output_dir", str(folder)]


def on(tmp, **columns):
    return ["--train_file", table(tmp / "data.jsonl", **columns)]


HEAD = "text,label\n"
LORA = ["--use_peft", "--model_name_or_path", "TRAINED"]
BAD_INPUT = {
    "no data": (lambda tmp, model: [], "one of --dataset_name and --train_file is needed"),
    "two datasets": (lambda tmp, model: [*on(tmp), "--dataset_name", "x"], "and only one"),
    "missing file": (lambda tmp, model: ["--train_file", str(tmp / "nowhere.csv")], "nowhere.csv"),
    "kind of file": (lambda tmp, model: written(tmp / "a.docx", "x"), "a.docx' is not allowed: one of .csv, .tsv"),
    "empty file": (lambda tmp, model: written(tmp / "a.csv", ""), "a.csv' is empty"),
    "no rows": (lambda tmp, model: written(tmp / "a.csv", HEAD), "a.csv' holds no example"),
    "malformed csv": (
        lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a,0\nb,1,2,3\n"),
        "a.csv' cannot be read: line 3 has 4 fields, and the header 2",
    ),
    "malformed json": (lambda tmp, model: written(tmp / "a.json", '{"text": "a"}\n{"text":\n'), "a.json' cannot be"),
    "malformed parquet": (lambda tmp, model: written(tmp / "a.parquet", "x"), "a.parquet' cannot be read"),
    "not utf-8": (
        lambda tmp, model: [
            (tmp / "a.csv").write_bytes(b"text,label\n\xff,1\n") and "--train_file",
            str(tmp / "a.csv"),
        ],
        "a.csv' cannot be read",
    ),
    "other columns": (
        lambda tmp, model: [*on(tmp), str(table(tmp / "b.csv", text=lambda t, k: t, kind=lambda t, k: k))],
        "has no label in column 'label'",
    ),
    "no text column to validate on": (
        lambda tmp, model: [
            *on(tmp),
            "--validation_file",
            table(tmp / "v.csv", x=lambda t, k: t, label=lambda t, k: k),
        ],
        "v.csv has no column 'text'; its columns are 'x', 'label'",
    ),
    "no text column": (
        lambda tmp, model: on(tmp, words=lambda t, k: t, label=lambda t, k: k),
        "columns are 'words'",
    ),
    "no such text column": (lambda tmp, model: [*on(tmp), "--text_column_names", "x"], "'x' is no column"),
    "one column twice": (
        lambda tmp, model: [*on(tmp), "--text_column_names", "text", "text"],
        "--text_column_names text text is not allowed: each column once",
    ),
    "texts that are the labels": (
        lambda tmp, model: [*on(tmp), "--text_column_names", "label"],
        "--text_column_names and --label_column_name are both the column 'label'",
    ),
    "other case of a column": (
        lambda tmp, model: written(tmp / "a.csv", "Text,Label\na,0\n"),
        "--text_column_names is needed: no column is called 'text'; the dataset's columns are 'Text', 'Label'",
    ),
    "text in a comma": (lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a, b,0\nc, d,1\n"), "line 2 has 3 fields"),
    "a number among texts": (
        lambda tmp, model: written(tmp / "a.jsonl", '{"text": "a", "label": 0}\n{"text": 5, "label": 1}\n' * 9),
        "a.jsonl has 5, which is no text, in column 'text'",
    ),
    "three columns": (lambda tmp, model: [*on(tmp), "--text_column_names", "x", "y", "z"], "one or two"),
    "no label column": (lambda tmp, model: on(tmp, text=lambda t, k: t), "--label_column_name is needed"),
    "row without text": (
        lambda tmp, model: on(tmp, text=lambda t, k: t if k else None, label=lambda t, k: k),
        "row 0 of ",
    ),
    "file of a row without text": (
        lambda tmp, model: on(tmp, text=lambda t, k: t if k else None, label=lambda t, k: k),
        "data.jsonl has no text in column 'text'",
    ),
    "text that is a number": (
        lambda tmp, model: on(tmp, text=lambda t, k: k, label=lambda t, k: k),
        "which is no text",
    ),
    "row without label": (lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a,x\nb,\nc,y\nd,x\n"), "has no label"),
    "one label": (lambda tmp, model: on(tmp, text=lambda t, k: t, label=lambda t, k: "x"), "single class, 'x'"),
    "not a number": (
        lambda tmp, model: [*on(tmp, text=lambda t, k: t, label=lambda t, k: "x"), "--do_regression"],
        "a finite number is needed",
    ),
    "wrong labels of numbers": (
        lambda tmp, model: [*on(tmp, text=lambda t, k: t, label=lambda t, k: k + 0.5), "--label_noise", "0.2"],
        "--label_noise 0.2 is not supported here: it needs one class per text",
    ),
    "labels of new names": (
        lambda tmp, model: [*on(tmp, text=lambda t, k: t, label=lambda t, k: k), "--model_name_or_path", "TRAINED"],
        "no class for the labels '0', '1': its head tells 'bad', 'good' apart",
    ),
    "head for another problem": (
        lambda tmp, model: [*on(tmp), *with_config(tmp / "m", model, problem_type="regression")],
        "the labels ask for 'single_label_classification'",
    ),
    "unknown task": (lambda tmp, model: ["--task_name", "mrcp"], "--task_name 'mrcp' is not allowed: one of cola"),
    "task and file": (lambda tmp, model: [*on(tmp), "--task_name", "mrpc"], "--task_name is a dataset"),
    "task without a network": (lambda tmp, model: ["--task_name", "mrpc"], "'nyu-mll/glue' is neither a folder here"),
    "no padding": (
        lambda tmp, model: [*on(tmp), *without_padding(tmp / "m", model)],
        "no token to pad with: --pad_token '</s>', its end of text, will do",
    ),
    "unknown padding": (
        lambda tmp, model: [*on(tmp), *NEW_MODEL, "--pad_token", "[X]"],
        "--pad_token '[X]' is not in",
    ),
    "longer than the positions": (
        lambda tmp, model: [*on(tmp), *NEW_MODEL, "--max_seq_length", "513"],
        "--max_seq_length 513 is not allowed: 2 to 512",
    ),
    "no length": (lambda tmp, model: [*on(tmp), *NEW_MODEL, "--max_seq_length", "1"], "--max_seq_length 1 is not"),
    "few tokens": (lambda tmp, model: [*on(tmp), "--vocab_size", "20"], "--vocab_size 20 is not allowed: 259 or more"),
    "tokenizer too large": (
        lambda tmp, model: [*on(tmp), "--config_name", tiny_config(tmp), "--tokenizer_name", "TRAINED"],
        "and the model embeds 100",
    ),
    "missing tokenizer": (lambda tmp, model: [*on(tmp), "--tokenizer_name", str(tmp / "t")], "--tokenizer_name"),
    "unknown metric": (lambda tmp, model: [*on(tmp), *NEW_MODEL, "--metric", "glue"], "--metric 'glue' cannot be"),
    "adapters of a new model": (lambda tmp, model: [*on(tmp), "--use_peft"], "--use_peft needs --model_name_or_path"),
    "rank without adapters": (lambda tmp, model: [*on(tmp), "--lora_r", "4"], "--lora_r needs --use_peft"),
    "rank": (lambda tmp, model: [*on(tmp), *LORA, "--lora_r", "0"], "--lora_r 0 is not allowed"),
    "dropout": (lambda tmp, model: [*on(tmp), *LORA, "--lora_dropout", "1"], "--lora_dropout 1.0 is not allowed"),
    "no such layer": (
        lambda tmp, model: [*on(tmp), *LORA, "--lora_target_modules", "q_proj"],
        "--lora_target_modules q_proj cannot be used",
    ),
    "search without ascent": (
        lambda tmp, model: [*on(tmp), "--rho_search", "grid", "--k", "0"],
        "needs --k 1 or more",
    ),
    "search in the way": (
        lambda tmp, model: [*on(tmp), *NEW_MODEL, "--rho_search", "0.1", *in_the_way(tmp / "mine")],
        "rho_search_trials is in the way",
    ),
    "zeros and ones for labels": (
        lambda tmp, model: on(tmp, text=lambda t, k: t, label=lambda t, k: [0, 1, 0, k]),
        "each once, not a 0 or 1 for every label",
    ),
    "no tokenizer": (lambda tmp, model: [*on(tmp), *without_tokenizer(tmp / "m", model)], "holds no tokenizer"),
    "many rates": (
        lambda tmp, model: [*on(tmp), "--rho_search", "1", "--learning_rate_search", *map(str, range(1, 9))],
        "8 values: 7 at most",
    ),
    "batches apart": (
        lambda tmp, model: [*on(tmp), *NEW_MODEL, "--eval_do_concat_batches", "false"],
        "--eval_do_concat_batches false is not supported",
    ),
    "losses only": (lambda tmp, model: [*on(tmp), *NEW_MODEL, "--prediction_loss_only", "true"], "--prediction_loss_"),
    "search and rho": (
        lambda tmp, model: [*on(tmp), "--rho_search", "grid", "--rho", "1"],
        "--rho_search and --rho 1",
    ),
    "search of nothing": (lambda tmp, model: [*on(tmp), "--rho_search", "big"], "--rho_search 'big' is not allowed"),
    "search of a negative": (lambda tmp, model: [*on(tmp), "--rho_search", "-1"], "--rho_search '-1' is not allowed"),
    "search without validation": (
        lambda tmp, model: [*on(tmp), "--rho_search", "0.1", "--train_val_split", "0"],
        "--rho_search needs validation data",
    ),
    "rates without search": (lambda tmp, model: [*on(tmp), "--learning_rate_search", "1"], "needs --rho_search"),
    "no seeds": (lambda tmp, model: [*on(tmp), "--rho_search", "1", "--search_seeds", "0"], "--search_seeds 0"),
}


def tiny_config(tmp):
    BertConfig(vocab_size=100, hidden_size=16, num_attention_heads=2).save_pretrained(tmp / "config")
    return str(tmp / "config")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, trained, tmp_path, capfd):
    make, message = BAD_INPUT[case]
    flags = [str(trained) if flag == "TRAINED" else flag for flag in make(tmp_path, trained)]
    capfd.readouterr()
    assert main(["--output_dir", str(tmp_path / "runs" / "out"), *flags, *QUICK]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not (tmp_path / "runs").exists()


def test_the_folder_holds_results_that_load_and_predict(tmp_path, capsys):
    out = tmp_path / "out"
    files = ["--train_file", table(tmp_path / "a.csv"), "--test_file", table(tmp_path / "b.parquet", 20)]
    flags = [*files, *NEW_MODEL, *QUICK, "--num_train_epochs", "6", "--metric", "accuracy", "f1"]
    assert main([*flags, "--output_dir", str(out)]) == 0
    assert "| test_accuracy" in capsys.readouterr().out
    results = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_accuracy", "eval_f1", "test_accuracy"} <= set(results)
    assert results["train_samples"] == 40 and results["eval_samples"] == 8

    classify = pipeline("text-classification", model=str(out), device="cpu")
    rows = load_dataset("parquet", data_files=files[-1])["train"]
    right = [found["label"] == label for found, label in zip(classify(rows["text"][:]), rows["label"][:], strict=True)]
    assert np.mean(right) == pytest.approx(results["test_accuracy"]) and results["test_accuracy"] > 0.8


LOOKAHEAD = ["--lookahead_steps", "2"]


@pytest.mark.rehearsed
@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="lookbehind"),
        pytest.param([*LOOKAHEAD, "--k", "1"], id="lookahead", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, capsys, more):
    flags = ["--train_file", table(tmp_path / "a.csv"), *QUICK, "--vocab_size", "300", *more]
    flags += ["--config_overrides", f"{TINY},hidden_dropout_prob=0.1", "--max_steps", "5", "--save_steps", "3"]
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resume = [*flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"]
    other = ["--lookahead_steps", "0"] if more else [*LOOKAHEAD, "--alpha", "1"]
    assert main([*resume, *other]) == 2
    assert f"checkpoint-3 was trained {'with' if more else 'without'} Lookahead" in capsys.readouterr().err
    assert main(resume) == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert ("in Lookahead (k=2, alpha=0.5)" in (tmp_path / "whole" / "README.md").read_text()) is bool(more)


def test_pairs_of_texts_and_numbers(tmp_path):
    pair = dict(sentence1=lambda t, k: t, sentence2=lambda t, k: t[::-1], label=lambda t, k: 0.5 + k)
    flags = [*on(tmp_path, **pair), *NEW_MODEL, *QUICK, "--max_steps", "2", "--metric", "mse", "pearson"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    assert {"eval_mse", "eval_pearson"} <= set(results.metrics)
    assert results.metrics["eval_mse"] == pytest.approx(results.metrics["eval_loss"], rel=1e-5)
    assert results.trainer.model.config.problem_type == "regression"
    ends = [row["input_ids"].count(2) for row in results.datasets["train"]]
    assert set(ends) == {2}  # each text of a pair ends


@pytest.mark.slow
def test_label_noise_reaches_the_labels_of_the_training_alone(tmp_path):
    flags = [*on(tmp_path), *NEW_MODEL, *QUICK, "--max_steps", "1", "--train_val_split", "0.25"]
    clean = train([*flags, "--output_dir", str(tmp_path / "clean")]).datasets
    noisy = train([*flags, "--label_noise", "0.5", "--output_dir", str(tmp_path / "noisy")]).datasets
    differing = np.not_equal(noisy["train"]["labels"][:], clean["train"]["labels"][:])
    assert differing.sum() == round(0.5 * len(differing))
    assert noisy["validation"]["labels"][:] == clean["validation"]["labels"][:]


@pytest.mark.parametrize("as_list", [True, False])
def test_sets_of_labels(tmp_path, as_list):
    """A list of labels, or a text that a separator divides, give the same targets."""

    def make(text, kind):
        found = ["long"] * (len(text) > 28) + [["bad", "good"][kind]] * (text[0] != "i")
        return found if as_list else ";".join(found)

    flags = [*on(tmp_path, text=lambda t, k: t, labels=make), *NEW_MODEL, *QUICK, "--max_steps", "2"]
    flags += [] if as_list else ["--label_separator", ";"]
    results = train([*flags, "--train_val_split", "0", "--output_dir", str(tmp_path / "out")])
    assert list(results.trainer.model.config.label2id) == ["bad", "good", "long"]
    expected = [
        [float(t[0] != "i" and k == 0), float(t[0] != "i" and k == 1), float(len(t) > 28)] for t, k in sentences(48)
    ]
    assert results.datasets["train"]["labels"][:] == expected
    assert any(sum(row) == 2 for row in expected) and any(sum(row) < 2 for row in expected)


def test_a_saved_dataset_with_named_labels(tmp_path, trained):
    """By name: the dataset counts good as 0, the model as 1."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = [{"text": text, "label": 1 - kind} for text, kind in sentences(16)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(trained), *QUICK]
    results = train([*flags, "--max_steps", "1", "--train_val_split", "0", "--output_dir", str(tmp_path / "out")])
    assert results.datasets["train"]["labels"][:] == [kind for _, kind in sentences(16)]


def prepared(*flags):
    """The task that the program makes of the flags, and its model, untrained."""
    args = make_parser().parse([*flags, *NEW_MODEL])
    task = prepare(args)
    return task, task.load_model().config


def test_a_file_that_is_larger_than_what_is_read_at_once(tmp_path):
    """No class in two, no text altered, no number refused for what stands in the first 10000 rows."""
    spelled = {
        "classes": lambda late, i: ["ab", "01"][i % 2 or late],
        "numbers": lambda late, i: f"{i % 3}.5" if late else str(i % 3),
        "words": lambda late, i: "other" if late else str(i % 2),
    }
    found = {}
    for name, label in spelled.items():
        text = "".join(f"{'005' if i == 10_100 else 'a film'},{label(i >= 10_000, i)}\n" for i in range(10_200))
        flags = [
            *written(tmp_path / f"{name}.csv", HEAD + text),
            "--train_val_split",
            "0",
            "--max_train_samples",
            "60",
        ]
        found[name] = prepared(*flags, "--output_dir", str(tmp_path / "out"))[1]
    assert list(found["classes"].label2id) == ["01", "ab"] and list(found["words"].label2id) == ["0", "1", "other"]
    assert found["numbers"].problem_type == "regression"


def test_a_subset_may_lack_a_class(tmp_path):
    text = "".join(f"film {i},c{i % 40}\n" for i in range(400))
    flags = [
        *written(tmp_path / "a.csv", HEAD + text),
        "--max_train_samples",
        "60",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    task, config = prepared(*flags)
    assert config.num_labels == len(task.classes) == 40 and len(task.datasets["train"]) == 60


def test_a_word_such_as_na_is_a_text(tmp_path):
    file = written(tmp_path / "a.csv", HEAD + "NA,null\nnone,nan\n" * 4)
    results = train([*file, *NEW_MODEL, *QUICK, "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert list(results.trainer.model.config.label2id) == ["nan", "null"]


def test_adapters_train_alone_and_load(tmp_path, trained):
    flags = ["--train_file", table(tmp_path / "a.csv"), *QUICK, "--max_steps", "3", "--k", "2", "--rho", "0.01"]
    flags += ["--model_name_or_path", str(trained), "--use_peft", "--lora_r", "2"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    moved = {name for name, p in results.trainer.model.named_parameters() if p.requires_grad}
    assert moved and all("lora_" in name or "classifier" in name for name in moved)
    assert not (tmp_path / "out" / "model.safetensors").exists()

    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer([text for text, _ in sentences(8)], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, results.trainer.model.eval()(**batch).logits)
    base = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    assert not torch.allclose(base(**batch).logits, loaded(**batch).logits, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        DistilBertConfig,
        GPT2Config,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (DebertaV2Config, BertConfig)),
    ],
)
def test_a_new_head_is_trained_and_saved_whole_beside_adapters(tmp_path, kind):
    """Also where it has more than one layer: what stays random would be drawn anew when the adapters are loaded."""
    config = kind(vocab_size=300, pad_token_id=0, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size = 16
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenization.train_tokenizer(["a few words"], 300, frame=True).save_pretrained(tmp_path / "base")
    flags = ["--train_file", table(tmp_path / "a.csv"), *QUICK, "--max_steps", "2", "--use_peft", "--lora_r", "2"]
    results = train([*flags, "--model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")])
    ids, found = torch.tensor([[5, 6, 7]]), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2).eval()
        found.append(loaded(input_ids=ids).logits)
    trained_logits = results.trainer.model.eval()(input_ids=ids).logits
    assert all(torch.equal(logits, trained_logits) for logits in found)


def test_a_trained_tokenizer_loses_nothing():
    tokenizer = tokenization.train_tokenizer(["a few words"], 300, frame=True)
    for text in ("a few words", "Übermut — 数学 \n\t«x»"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.drawn
def test_the_search_chooses_the_radius_of_the_final_training(tmp_path, capsys):
    """The best of the table is what trains; a far too large radius is not it."""
    out = tmp_path / "out"
    flags = ["--train_file", table(tmp_path / "a.csv"), *NEW_MODEL, *QUICK, "--num_train_epochs", "2", "--k", "1"]
    # none of the rates is that of QUICK
    search = ["--rho_search", "0.05", "50", "--learning_rate_search", "1e-3", "8e-3", "--search_seeds", "2"]
    with pytest.warns(UserWarning, match="edge of the grid"):
        assert main([*flags, *search, "--metric_for_best_model", "loss", "--output_dir", str(out)]) == 0
    found = json.loads((out / "rho_search.json").read_text())
    assert found["metric"] == "loss" and found["seeds"] == [1042, 1043] and len(found["result"]["table"]) == 4
    means = {tuple(row["settings"].values()): np.mean(row["scores"]) for row in found["result"]["table"]}
    best = max(means, key=means.get)
    assert tuple(found["result"]["best"].values()) == best and best[0] < 50
    config = json.loads((out / "lookbehind_config.json").read_text())
    results = json.loads((out / "all_results.json").read_text())
    assert config["rho"] == results["search_rho"] == best[0] and results["search_learning_rate"] == best[1]
    assert torch.load(out / "training_args.bin", weights_only=False).learning_rate == best[1]
    assert (out / "rho_search.png").read_bytes()[:4] == b"\x89PNG" and not (out / "rho_search_trials").exists()
    assert "chosen" in capsys.readouterr().out

    # the model is that of the same flags without a search
    given = ["--rho", str(best[0]), "--learning_rate", str(best[1])]
    assert main([*flags, *given, "--output_dir", str(tmp_path / "given")]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_does_not_search_again(tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = ["--train_file", table(tmp_path / "a.csv"), *NEW_MODEL, *QUICK, "--max_steps", "2", "--save_steps", "1"]
    flags += ["--rho_search", "0.03", "--search_max_steps", "1", "--output_dir", str(out)]
    assert main(flags) == 0
    shutil.rmtree(out / "checkpoint-2")
    monkeypatch.setattr(
        "hf_lookbehind.programs.tuning.rho_search.grid_search", lambda *_: pytest.fail("searched again")
    )
    assert main([*flags, "--resume_from_checkpoint", "last"]) == 0
    assert json.loads((out / "all_results.json").read_text())["search_rho"] == 0.03


@pytest.mark.rehearsed
def test_a_search_never_holds_two_models(tmp_path, monkeypatch):
    """The rehearsal's, one that is probed, two of the search, the final one: each is gone before the next is made."""
    made, alive = [], []

    def make_model(self, *args, original=Task.make_model):
        alive.append(sum(model() is not None for model in made))
        model = original(self, *args)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Task, "make_model", make_model)
    flags = ["--train_file", table(tmp_path / "a.csv"), *NEW_MODEL, *QUICK, "--max_steps", "1"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.warns(UserWarning, match="edge of the grid"):
            search = ["--rho_search", "0.02", "0.03", "--enable_jit_checkpoint"]
            assert main([*flags, *search, "--output_dir", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert alive == [0, 0, 0, 0, 0]


def test_diverged_trainings_lose_the_search(tmp_path, monkeypatch):
    from hf_lookbehind import LookbehindTrainer

    def diverge(self, *args, original=LookbehindTrainer.train, **kwargs):
        if self.lookbehind_config.rho == 0.02 and "rho_search_trials" in self.args.output_dir:
            raise FloatingPointError("no finite gradient")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LookbehindTrainer, "train", diverge)
    flags = ["--train_file", table(tmp_path / "a.csv"), *NEW_MODEL, *QUICK, "--max_steps", "1"]
    with pytest.warns(UserWarning, match="edge of the grid"):
        search = ["--rho_search", "0.02", "0.03", "--search_seeds", "2"]
        assert main([*flags, *search, "--output_dir", str(tmp_path / "out")]) == 0
    text = (Path(tmp_path) / "out" / "rho_search.json").read_text()
    assert json.loads(text)["result"]["best"]["rho"] == 0.03 and "NaN" not in text
