"""The program for encoder-decoder models, from pairs of texts to a folder of results."""

import json
import random
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from datasets import Dataset
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
    GPT2Config,
    M2M100Config,
    MBartConfig,
    MBartTokenizer,
    T5Config,
)

from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.models import encoder_decoder, tokenization
from hf_lookbehind.scripts.run_seq2seq import main, make_parser, train
from tests.caches import set_caches
from tests.processes import run_group

TINY = "d_model=32,d_kv=16,d_ff=32,num_layers=1,num_decoder_layers=1,num_heads=2"
NEW_MODEL = ["--config_overrides", TINY, "--vocab_size", "300", "--max_source_length", "40"]
QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]
GENERATE = ["--predict_with_generate", "--metric", "exact_match", "--max_target_length", "8"]
NAMES = ["emma", "anne", "jane", "fanny"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny T5 that knows some names, and its tokenizer, as the program saves them."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*table(folder / "pairs.csv", 96), *NEW_MODEL, *QUICK, *GENERATE, "--num_train_epochs", "12", "--k", "1"]
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        assert main([*flags, "--save_strategy", "no", "--output_dir", str(folder / "model")]) == 0
    return folder / "model"


def pairs(n):
    """Small letters, and the name in them as it is written."""
    draw = random.Random(0)
    words = "we saw her at the ball then and was".split()
    rows = []
    for i in range(n):
        before, after = draw.choices(words, k=i % 3), draw.choices(words, k=2)
        name = NAMES[i % len(NAMES)]
        rows.append((" ".join([*before, name, *after]), name.title()))
    return rows


def table(path, n=24, flag="train_file", rows=None, **columns):
    """A file of rows; columns as functions of (source, target)."""
    columns = columns or {"source": lambda source, target: source, "target": lambda source, target: target}
    data = Dataset.from_list([{name: make(*row) for name, make in columns.items()} for row in rows or pairs(n)])
    {".csv": data.to_csv, ".jsonl": data.to_json}[path.suffix](path)
    return [f"--{flag}", str(path)]


def translations(path, languages=("en", "de")):
    return table(path, 16, translation=lambda s, t: dict(zip(languages, (s, t), strict=True)))


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return ["--train_file", str(path)]


def saved(folder, config):
    config.save_pretrained(folder)
    return ["--config_name", str(folder), "--tokenizer_name", "TRAINED"]


def bart(**overrides):
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    tokens = dict(vocab_size=300, pad_token_id=0, bos_token_id=2, eos_token_id=2, decoder_start_token_id=2)
    ends = dict(encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, forced_eos_token_id=2)
    return BartConfig(**(sizes | tokens | ends | overrides))


def without_padding(folder, model):
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


def language_model(folder, kind, config):
    """A new model beside a tokenizer that marks its texts by language."""
    names = [(f"▁{name}", -1.0) for name in NAMES]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyzAEJF"]
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    codes = [(code, 0.0) for code in ("en_XX", "de_DE")]
    vocabulary = [*special, ("▁", -2.0), *names, *letters, *codes, ("<mask>", 0.0)]
    tokenizer = MBartTokenizer(vocab=vocabulary)
    tokenizer.save_pretrained(folder)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    AutoModelForSeq2SeqLM.from_config(
        config(vocab_size=len(tokenizer), encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes, **kind)
    ).save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


def translated(path, other):
    """Translations, and another row among them, the fourth."""
    rows = [{"translation": {"en": "a", "de": "b"}}] * 3 + [{"translation": other}]
    return written(path, "\n".join(map(json.dumps, rows)))


FROM_EN_TO_DE = ["--source_lang", "en", "--target_lang", "de", "--train_val_split", "0"]
HEAD = "source,target\n"
LORA = ["--use_peft", "--model_name_or_path", "TRAINED"]
BAD_INPUT = {
    "no data": (lambda tmp, model: [], "one of --dataset_name and --train_file is needed"),
    "missing file": (lambda tmp, model: ["--train_file", str(tmp / "nowhere.csv")], "nowhere.csv"),
    "empty file": (lambda tmp, model: written(tmp / "a.csv", ""), "a.csv' is empty"),
    "malformed csv": (
        lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a,b\nb,1,2,3\n"),
        "a.csv' cannot be read: line 3 has 4 fields, and the header 2",
    ),
    "no source column": (
        lambda tmp, model: table(tmp / "a.csv", words=lambda s, t: s, target=lambda s, t: t),
        "--source_column is needed: no column is called 'source' or 'text' or 'article'",
    ),
    "no such target column": (
        lambda tmp, model: [*table(tmp / "a.csv"), "--target_column", "x"],
        "--target_column 'x' is no column; the dataset's columns are 'source', 'target'",
    ),
    "row without source": (
        lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a,b\n,c\n" + "d,e\n" * 5),
        "no text in column 'so",
    ),
    "row without target": (lambda tmp, model: written(tmp / "a.csv", f"{HEAD}a,b\nb,\n" + "d,e\n" * 5), "row 1 of "),
    "one language": (lambda tmp, model: [*table(tmp / "a.csv"), "--source_lang", "en"], "go together"),
    "unknown language": (
        lambda tmp, model: [*translations(tmp / "a.jsonl"), "--source_lang", "en", "--target_lang", "ro_RO"],
        "--target_lang 'ro_RO' is no key of the column 'translation': 'en', 'de'",
    ),
    "one column for both": (
        lambda tmp, model: [*table(tmp / "a.csv"), "--source_column", "target", "--target_column", "target"],
        "--source_column and --target_column are both the column 'target'",
    ),
    "one language for both": (
        lambda tmp, model: [*translations(tmp / "a.jsonl"), "--source_lang", "en", "--target_lang", "en_XX"],
        "--source_lang and --target_lang are both the column 'translation.en'",
    ),
    "row without a language": (
        lambda tmp, model: [*translated(tmp / "a.jsonl", {"en": "a"}), *FROM_EN_TO_DE],
        "a.jsonl has no text in column 'translation.de'",
    ),
    "row without a translation": (
        lambda tmp, model: [*translated(tmp / "a.jsonl", None), *FROM_EN_TO_DE],
        "has no text in column 'translation.en'",
    ),
    "row of another kind": (
        lambda tmp, model: [*translated(tmp / "a.jsonl", "a"), *FROM_EN_TO_DE],
        "a.jsonl has 'a' in column 'translation': a text per language is needed",
    ),
    "number for a text": (
        lambda tmp, model: [*translated(tmp / "a.jsonl", {"en": "a", "de": 5}), *FROM_EN_TO_DE],
        "has {'en': 'a', 'de': 5} in column 'translation': a text per language is needed",
    ),
    "languages of the tokenizer": (
        lambda tmp, model: [*table(tmp / "a.csv"), *language_model(tmp / "m", {}, MBartConfig)],
        "--source_lang and --target_lang are needed",
    ),
    "no language of the tokenizer": (
        lambda tmp, model: [
            *table(tmp / "a.csv"),
            *language_model(tmp / "m", {}, MBartConfig),
            *("--source_lang", "en_XX", "--target_lang", "xx_XX"),
        ],
        "--target_lang 'xx_XX' is not in the tokenizer's vocabulary",
    ),
    "unknown first token": (
        lambda tmp, model: [*table(tmp / "a.csv"), *NEW_MODEL, "--forced_bos_token", "<x>"],
        "--forced_bos_token '<x>' is not in",
    ),
    "decoder-only model": (
        lambda tmp, model: [*table(tmp / "a.csv"), *saved(tmp / "c", GPT2Config(vocab_size=300))],
        "(gpt2) is no encoder-decoder model",
    ),
    "no padding": (
        lambda tmp, model: [*table(tmp / "a.csv"), *without_padding(tmp / "m", model)],
        "no token to pad with: --pad_token '</s>', its end of text, will do",
    ),
    "longer than the positions": (
        lambda tmp, model: [*table(tmp / "a.csv"), *saved(tmp / "c", bart()), "--max_source_length", "33"],
        "--max_source_length 33 is not allowed: 2 to 32",
    ),
    "target longer than the positions": (
        lambda tmp, model: [*table(tmp / "a.csv"), *saved(tmp / "c", bart()), "--val_max_target_length", "33"],
        "--val_max_target_length 33 is not allowed: 2 to 32",
    ),
    "no length": (lambda tmp, model: [*table(tmp / "a.csv"), *NEW_MODEL, "--max_target_length", "0"], "length 0"),
    "generate nothing": (lambda tmp, model: [*table(tmp / "a.csv"), "--generation_max_length", "1"], "2 or more"),
    "no beam": (lambda tmp, model: [*table(tmp / "a.csv"), "--num_beams", "0"], "--num_beams 0 is not allowed"),
    "two numbers of beams": (
        lambda tmp, model: [*table(tmp / "a.csv"), "--num_beams", "2", "--generation_num_beams", "3"],
        "--num_beams 2 and --generation_num_beams 3 differ",
    ),
    "no generation config": (
        lambda tmp, model: [*table(tmp / "a.csv"), *NEW_MODEL, "--generation_config", str(tmp / "g")],
        "/g' cannot be used",
    ),
    "a metric of nothing": (
        lambda tmp, model: [*table(tmp / "a.csv"), "--metric", "rouge"],
        "--metric rouge needs --predict_with_generate",
    ),
    "generation and loss only": (
        lambda tmp, model: [*table(tmp / "a.csv"), "--predict_with_generate", "--prediction_loss_only"],
        "exclude each other",
    ),
    "a best metric that is not reported": (
        lambda tmp, model: [*table(tmp / "a.csv"), *NEW_MODEL, "--metric_for_best_model", "rouge1"],
        "'rouge1' is not reported: allowed are loss",
    ),
    "unknown metric": (
        lambda tmp, model: [*table(tmp / "a.csv"), *NEW_MODEL, "--predict_with_generate", "--metric", "meteor"],
        "--metric 'meteor' cannot be loaded: rouge, bleu, exact_match come with the program",
    ),
    "tokenizer too large": (
        lambda tmp, model: [*table(tmp / "a.csv"), *saved(tmp / "c", T5Config(vocab_size=100))],
        "and the model embeds 100",
    ),
    "no such layer": (
        lambda tmp, model: [*table(tmp / "a.csv"), *LORA, "--lora_target_modules", "q_proj"],
        "--lora_target_modules q_proj cannot be used",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, trained, tmp_path, capfd):
    make, message = BAD_INPUT[case]
    flags = [str(trained) if flag == "TRAINED" else flag for flag in make(tmp_path, trained)]
    capfd.readouterr()
    assert main([*flags, *QUICK, "--output_dir", str(tmp_path / "runs" / "out")]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, package", [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, capfd, name, package):
    monkeypatch.setattr(evaluation, "find_spec", lambda wanted: None)
    flags = [*table(tmp_path / "a.csv"), *NEW_MODEL, "--predict_with_generate", "--metric", name]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--metric {name} needs the package {package}" in capfd.readouterr().err


def generated(folder, sources, model=None, **options):
    """What a saved model makes of texts, one by one, as its generation config says."""
    model = model or AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for source in sources:
        ids = model.eval().generate(**tokenizer(source, return_tensors="pt"), **options)[0]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def test_the_folder_holds_results_that_load_and_generate(trained, tmp_path):
    sources, targets = zip(*pairs(14), strict=True)
    files = [*table(tmp_path / "a.csv"), *table(tmp_path / "b.jsonl", 14, flag="test_file")]
    flags = [*files, "--model_name_or_path", str(trained), *QUICK, "--predict_with_generate", "--max_steps", "1"]
    flags += ["--metric", "exact_match", "bleu", "rouge", "--num_beams", "2", "--learning_rate", "1e-4"]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"eval_exact_match", "eval_bleu", "eval_rouge1", "eval_rougeL", "test_rouge2"} <= set(results)

    texts = generated(tmp_path / "out", sources, num_beams=2)
    right = 100 * np.mean([text == target for text, target in zip(texts, targets, strict=True)])
    assert results["test_exact_match"] == pytest.approx(right) and right > 60
    assert results["test_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [list(targets)]).score)


def test_without_generation_the_loss_alone_is_reported_and_rates_checkpoints(tmp_path):
    flags = [*table(tmp_path / "a.csv"), *NEW_MODEL, *QUICK, "--max_steps", "2", "--save_steps", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    of_evaluation = {name for name in results.metrics if name.startswith("eval_")}
    assert of_evaluation == {"eval_loss", *(f"eval_{n}" for n in ("runtime", "samples", "samples_per_second",
                             "steps_per_second"))}  # fmt: skip
    losses = [entry["eval_loss"] for entry in results.trainer.state.log_history if "eval_loss" in entry]
    assert results.trainer.state.best_metric == min(losses)


def test_generated_texts_rate_checkpoints(trained, tmp_path):
    flags = [*table(tmp_path / "a.csv"), "--model_name_or_path", str(trained), *QUICK, *GENERATE, "--max_steps", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    assert results.trainer.args.metric_for_best_model == "exact_match" and results.trainer.args.greater_is_better
    assert results.trainer.state.best_metric == results.metrics["eval_exact_match"]


def test_targets_are_cut_and_ended_and_sources_get_the_prefix(trained, tmp_path):
    files = [*table(tmp_path / "a.csv"), *table(tmp_path / "b.csv", flag="validation_file")]
    flags = [*files, "--model_name_or_path", str(trained), *QUICK, "--max_steps", "1", "--source_prefix", "name: "]
    flags += ["--max_target_length", "2", "--val_max_target_length", "20"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for split, length in (("train", 2), ("validation", 20)):
        for (source, target), row in zip(pairs(24), results.datasets[split], strict=True):
            assert row["input_ids"] == tokenizer(f"name: {source}")["input_ids"]
            assert row["labels"] == [*tokenizer(target)["input_ids"][:-1][: length - 1], tokenizer.eos_token_id]


def test_the_generation_config_is_the_models_own(trained, tmp_path):
    """It outlives evaluations as it was; only where it tells no length, that of the targets is put down."""
    before = GenerationConfig.from_pretrained(trained)
    assert before.max_length == 9 and before.num_beams is None
    shutil.copytree(trained, tmp_path / "model")
    before.max_length, before.max_new_tokens, before.repetition_penalty = None, 5, 1.5
    before.save_pretrained(tmp_path / "model")
    flags = [*table(tmp_path / "a.csv"), "--model_name_or_path", str(tmp_path / "model"), *QUICK, "--max_steps", "1"]
    flags += ["--eval_on_start", "--num_beams", "2"]
    train([*flags, *GENERATE, "--output_dir", str(tmp_path / "out")])
    after = GenerationConfig.from_pretrained(tmp_path / "out")
    assert after.to_diff_dict() == before.to_diff_dict()


@pytest.mark.parametrize("given, tokens", [([], 2), (["--generation_max_length", "5"], 4)])
def test_evaluations_generate_as_long_as_targets_are(trained, tmp_path, given, tokens, monkeypatch):
    """Also where the model's own generation config asks for more new tokens."""
    shutil.copytree(trained, tmp_path / "model")
    tokenizer, generation = AutoTokenizer.from_pretrained(trained), GenerationConfig.from_pretrained(trained)
    generation.max_length, generation.max_new_tokens = None, 30
    generation.suppress_tokens = [tokenizer.pad_token_id, tokenizer.eos_token_id]  # no text ends by itself
    generation.save_pretrained(tmp_path / "model")
    seen = []
    monkeypatch.setattr(evaluation, "decode", lambda _, ids: seen.append(ids) or ["x"] * len(ids))
    flags = [*table(tmp_path / "a.csv"), "--model_name_or_path", str(tmp_path / "model"), *QUICK, "--max_steps", "1"]
    flags += ["--predict_with_generate", "--metric", "exact_match", "--max_target_length", "2", *given]
    train([*flags, "--output_dir", str(tmp_path / "out")])
    assert set((seen[0] > 0).sum(axis=1)) == {tokens}


def test_a_generation_config_of_the_flags_takes_the_place_of_the_models(trained, tmp_path):
    GenerationConfig(max_length=6, num_beams=2).save_pretrained(tmp_path / "given")
    flags = [*table(tmp_path / "a.csv"), "--model_name_or_path", str(trained), *QUICK, *GENERATE, "--max_steps", "1"]
    train([*flags, "--generation_config", str(tmp_path / "given"), "--output_dir", str(tmp_path / "out")])
    after, own = (GenerationConfig.from_pretrained(folder) for folder in (tmp_path / "out", trained))
    assert (after.max_length, after.num_beams) == (6, 2)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert getattr(after, name) == getattr(own, name) is not None


def test_padding_of_either_kind_is_no_text(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(["Emma", "Anne and Jane"])["input_ids"]
    rows = np.full((2, 30), -100)
    rows[0, : len(ids[0])], rows[1, : len(ids[1])] = ids[0], ids[1]
    rows[1, len(ids[1]) : 25] = tokenizer.pad_token_id
    assert evaluation.decode(tokenizer, rows) == ["Emma", "Anne and Jane"]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    flags = [*table(tmp_path / "a.csv"), *QUICK, "--vocab_size", "300", "--predict_with_generate"]
    flags += ["--config_overrides", f"{TINY},dropout_rate=0.1", "--max_steps", "4", "--save_steps", "2", "--k", "2"]
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert main([*flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"]) == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def evaluated(flags, folder):
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        return train(flags).metrics["eval_exact_match"]


def test_each_example_counts_once_on_two_processes(trained, tmp_path):
    """Five examples in batches of two: the first ones would fill up the last batch."""
    sources = [source for source, _ in pairs(5)]
    texts = generated(trained, sources, max_length=9)
    rows = [(source, texts[i] if i < 3 else "nobody") for i, source in enumerate(sources)]
    flags = [*table(tmp_path / "a.csv"), *table(tmp_path / "b.csv", flag="validation_file", rows=rows), *QUICK]
    flags += ["--model_name_or_path", str(trained), *GENERATE, "--per_device_eval_batch_size", "2", "--max_steps", "1"]
    flags += ["--learning_rate", "0", "--output_dir", str(tmp_path / "out")]
    assert run_group(evaluated, flags, tmp_path) == [pytest.approx(60)] * 2


def test_adapters_train_alone_load_and_generate(trained, tmp_path):
    flags = [*table(tmp_path / "a.csv"), *QUICK, *GENERATE, "--max_steps", "3", "--k", "2", "--rho", "0.01"]
    flags += ["--model_name_or_path", str(trained), "--use_peft", "--lora_r", "2"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    model = results.trainer.model
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in moved}
    assert layers == {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}  # all linear ones but the output's
    assert not (tmp_path / "out" / "model.safetensors").exists()

    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    sources, targets = zip(*pairs(8), strict=True)
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(list(sources), padding=True, return_tensors="pt")
    start = torch.zeros(8, 1, dtype=torch.int64)
    with torch.no_grad():
        logits = loaded(**batch, decoder_input_ids=start).logits
        assert torch.equal(logits, model.eval()(**batch, decoder_input_ids=start).logits)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**batch, decoder_input_ids=start).logits, logits, atol=1e-4)
    assert results.metrics["eval_exact_match"] > 60
    assert set(generated(tmp_path / "out", sources, loaded, max_length=9)) & set(targets)


def test_translations_of_a_column_are_rated_with_bleu(tmp_path):
    """A code may be longer than the key."""
    flags = [*translations(tmp_path / "a.jsonl"), *NEW_MODEL, *QUICK, "--max_steps", "1", "--predict_with_generate"]
    flags += ["--source_lang", "de", "--target_lang", "en_XX", "--train_val_split", "0.25", "--max_target_length", "9"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    assert "eval_bleu" in results.metrics and "eval_rouge1" not in results.metrics
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    sources = {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in results.datasets["train"]}
    assert sources == {target for _, target in pairs(16)}  # from the second language to the first


def test_a_tokenizer_that_marks_languages(tmp_path):
    """Sources end with their language's code, targets with theirs, which mBART also starts from."""
    model = language_model(tmp_path / "m", {}, MBartConfig)
    flags = [*table(tmp_path / "a.csv"), *model, *QUICK, "--max_steps", "1", *GENERATE]
    flags += ["--source_lang", "en_XX", "--target_lang", "de_DE", "--forced_bos_token", "de_DE"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    english, german = tokenizer.convert_tokens_to_ids(["en_XX", "de_DE"])
    for row in results.datasets["train"]:
        assert row["input_ids"][-1] == english and row["labels"][-1] == german
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.forced_bos_token_id == generation.decoder_start_token_id == german
    assert tokenizer.src_lang == "en_XX" and tokenizer.tgt_lang == "de_DE"


def test_a_model_that_shifts_labels_only_inside(tmp_path):
    """M2M100 gives no method for its decoder's inputs: what we give it is what it makes itself."""
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = M2M100Config(vocab_size=300, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.0, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    tokenizer = tokenization.train_tokenizer(["a few words"], 300, frame=True)
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in ("a", "few words")]
    config.pad_token_id = tokenizer.pad_token_id
    batch = encoder_decoder.make_collator(model, tokenizer)(rows)
    own = model(**{name: tensor for name, tensor in batch.items() if name != "decoder_input_ids"})
    assert torch.equal(model(**batch).logits, own.logits)


def test_a_tokenizers_habit_does_not_limit_relative_positions(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained, model_max_length=16)
    of = dict(default=1024, tokenizer=tokenizer)
    assert tokenization.choose_length("max_source_length", 64, config=T5Config(), **of) == 64
    assert tokenization.choose_length("max_source_length", None, config=T5Config(), **of) == 16


def test_the_recipe_parses(tmp_path):
    args = make_parser().parse(["t5_seq2seq.yaml", *table(tmp_path / "a.csv"), "--output_dir", str(tmp_path / "out")])
    assert args.training.predict_with_generate and args.lookbehind.k == 2
