"""The program that tags words, from files of lists to a folder of results."""

import json
import random

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import AutoModelForTokenClassification, AutoTokenizer, RobertaConfig, RobertaForTokenClassification

from hf_lookbehind.scripts.run_token_classification import main, train
from tests.caches import set_caches

NAMES, PLACES, OTHERS = "Ada Grace Alan Kurt".split(), "London Vienna Princeton Rome".split(), "saw left knew".split()
TAGS = ["O", "B-PER", "B-LOC", "I-LOC"]
TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
NEW_MODEL = ["--config_overrides", TINY, "--vocab_size", "300"]
QUICK = "--disable_tqdm true --per_device_train_batch_size 8 --learning_rate 1e-2 --save_strategy no".split()


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def sentences(n=80):
    draw = random.Random(0)
    for _ in range(n):
        place = ["New", draw.choice(PLACES)]
        words = [draw.choice(NAMES), draw.choice(OTHERS), *place, "."]
        yield {"tokens": words, "ner_tags": ["B-PER", "O", "B-LOC", "I-LOC", "O"]}


def written(folder, rows, name="train"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"--{name}_file", str(path)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        flags = [*written(folder, sentences()), *NEW_MODEL, *QUICK, "--max_steps", "60", "--k", "2", "--rho", "0.02"]
        results = train([*flags, "--output_dir", str(folder / "model")])
    return folder / "model", results


def test_a_new_model_finds_entities(trained):
    folder, results = trained
    found = {name: results.metrics[f"eval_{name}"] for name in ("f1", "precision", "recall", "accuracy")}
    assert min(found.values()) > 0.9, found
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert sorted(model.config.label2id) == sorted(TAGS)
    assert json.loads((folder / "all_results.json").read_text())["eval_f1"] == found["f1"]


def test_a_label_stands_at_the_first_token_of_each_word(trained):
    folder, results = trained
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder)
    rows = results.datasets["train"]
    for row in rows.select(range(5)):
        words = tokenizer(tokenizer.decode(row["input_ids"][:-1]).split(), is_split_into_words=True).word_ids()
        first = [word is not None and word not in words[:i] for i, word in enumerate(words)]
        assert [label != -100 for label in row["labels"]] == first
        tags = [model.config.id2label[label] for label in row["labels"] if label != -100]
        assert tags == ["B-PER", "O", "B-LOC", "I-LOC", "O"]


def test_names_of_a_dataset_a_saved_head_and_adapters(tmp_path, trained):
    """Tags as numbers whose names the dataset knows, in another order than the head's."""
    folder, _ = trained
    names = ["I-LOC", "O", "B-LOC", "B-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    rows = [row | {"ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in sentences()]
    data = Dataset.from_list(rows, features=features)
    DatasetDict(train=data, validation=data.select(range(8))).save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(folder), "--use_peft", *QUICK]
    results = train([*flags, "--max_steps", "2", "--learning_rate", "1e-4", "--output_dir", str(tmp_path / "out")])
    assert results.metrics["eval_f1"] > 0.9 and results.metrics["eval_samples"] == 8
    trained_names = {n for n, p in results.trainer.model.named_parameters() if p.requires_grad}
    assert trained_names and all("lora" in n or "classifier" in n for n in trained_names)


def test_parts_of_speech_have_an_accuracy_alone(tmp_path):
    rows = [{"words": row["tokens"], "tags": ["NOUN", "VERB", "ADJ", "NOUN", "PUNCT"]} for row in sentences(40)]
    flags = [*written(tmp_path, rows), *NEW_MODEL, *QUICK, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert {n for n in train(flags).metrics if n.startswith("eval_")} >= {"eval_loss", "eval_accuracy"}
    assert main([*flags, "--overwrite_output_dir", "--metric", "f1"]) == 2


def test_a_tokenizer_of_bytes_knows_where_words_begin(tmp_path, trained):
    """RoBERTa's: a word is known by the space before it."""
    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, pad_token_id=0, num_labels=4, id2label=dict(enumerate(TAGS)),
    )  # fmt: skip
    RobertaForTokenClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = False
    tokenizer.save_pretrained(tmp_path / "roberta")
    flags = [*written(tmp_path, sentences(40)), "--model_name_or_path", str(tmp_path / "roberta"), *QUICK]
    results = train([*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "out")])
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.decode(results.datasets["train"][0]["input_ids"]).startswith(" ")


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"tokens": ["a", "b"], "ner_tags": ["O"]}], [], "has 2 words and 1 tags: one for each is needed"),
        ([{"tokens": "a b", "ner_tags": ["O", "O"]}], [], "'a b' in column 'tokens': a list of words is needed"),
        ([{"tokens": [], "ner_tags": []}], [], "[] in column 'tokens': a list of words is needed"),
        ([{"tokens": ["a"], "ner_tags": "O"}], [], "'O' in column 'ner_tags': a list of tags is needed"),
        ([{"text": ["a"], "ner_tags": ["O"]}], [], "no column is called 'tokens' or 'words'"),
        ([*sentences(4)], ["--metric", "bleu"], "--metric 'bleu'"),
        ([*sentences(4)], ["--max_seq_length", "1"], "--max_seq_length 1 is not allowed"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, rows, flags, message):
    given = [*written(tmp_path, [*sentences(4), *rows] if not flags and "tokens" in rows[0] else rows), *NEW_MODEL]
    assert main([*given, *flags, "--train_val_split", "0", "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_table_without_lists_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("tokens,ner_tags\na,O\n", encoding="utf-8")
    assert main(["--train_file", str(tmp_path / "a.csv"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "a.csv' is not allowed: one of .json, .jsonl, .parquet" in capsys.readouterr().err
