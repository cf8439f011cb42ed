"""Cards: what they say, what their metadata are, whose README stays."""

import re
import time
from dataclasses import replace

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_lookbehind.config import InputError, LookbehindConfig, LookbehindWarning
from hf_lookbehind.hub import LookbehindCardData, MethodRuns, Result
from hf_lookbehind.hub.card.license import license_of
from hf_lookbehind.hub.card.measured import write_flatness
from hf_lookbehind.hub.card.render import load, render, save
from hf_lookbehind.hub.redact import command, redact, redact_flags
from tests.hub_server import Repo


def data(settings=None, **known):
    return LookbehindCardData("reviews", LookbehindConfig(**(settings or {})).resolved(), **known)


RESULTS = [Result("validation", "accuracy", 0.875, 80), Result("test", "accuracy", 0.75, 40)]
KNOWN = dict(
    base_optimizer="adamw_torch, learning rate 2e-05",
    results=RESULTS,
    pipeline_tag="text-classification",
    dataset="user/reviews",
    dataset_name="user/reviews",
    dataset_config="plain",
    dataset_revision="abc123",
    base_model="user/base",
    base_name="user/base",
    license="mit",
    model_class="AutoModelForSequenceClassification",
    processor_class="AutoTokenizer",
    cost={"gradient passes per step": "3", "peak memory": "not measured"},
    figures={"training.png": "Loss over the training"},
    hyperparameters={"seed": "0"},
    command="hf-lookbehind text-classification",
    versions={"torch": "2.13.0"},
)


def test_the_metadata_read_back_as_they_were_given(tmp_path):
    card = ModelCard.load(save(data(**KNOWN), tmp_path))
    assert card.data.base_model == "user/base" and card.data.datasets == ["user/reviews"]
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-classification"
    assert {"lookbehind", "sharpness-aware-minimization"} <= set(card.data.tags)
    expected = [
        EvalResult(
            task_type="text-classification", dataset_type="user/reviews", dataset_name="user/reviews",
            dataset_config="plain", dataset_split=result.split, dataset_revision="abc123", metric_type="accuracy",
            metric_name="accuracy", metric_value=result.value,
        )
        for result in RESULTS
    ]  # fmt: skip
    assert card.data.eval_results == expected and card.data.model_name == "reviews"


def test_what_is_unknown_is_left_out_or_called_not_measured(tmp_path):
    card = ModelCard.load(save(data(), tmp_path))
    head = card.data.to_dict()
    assert not {"base_model", "datasets", "license", "model-index", "pipeline_tag", "model_name"} & set(head)
    assert "not measured" in card.text and "None" not in card.text and "## Results" not in card.text
    assert "trained from scratch with Lookbehind-SAM" in card.text


def test_a_result_that_is_no_number_is_in_the_table_and_not_in_the_metadata():
    text = render(data(**KNOWN | {"results": [Result("test", "loss", float("nan"), 4)]}))
    assert "| nan" in text and "model-index" not in text


@pytest.mark.parametrize("known", [{}, KNOWN], ids=["little", "much"])
def test_no_section_is_empty_and_no_line_is_left_half(known):
    text = render(data(**known))
    assert not re.search(r"\n## [^\n]+\n+(## |$)", text) and "\n\n\n" not in text
    assert "{{" not in text.replace("{{Lookbehind-SAM}", "") and "{%" not in text


@pytest.mark.parametrize(
    "settings, method, papers",
    [
        (dict(k=0), "the base optimizer alone", []),
        (dict(k=1), "SAM", ["foret"]),
        (dict(k=1, ascent="asam"), "ASAM", ["foret", "kwon"]),
        (dict(k=3, descent="last"), "multistep SAM", ["foret"]),
        (dict(k=2), "Lookbehind-SAM", ["mordido", "foret", "zhang"]),
        (dict(k=2, alpha=1), "Lookbehind-SAM", ["mordido", "foret"]),
        (dict(k=5, ascent="asam", alpha="adaptive"), "Lookbehind-ASAM", ["mordido", "foret", "kwon", "zhang"]),
    ],
)
def test_the_method_has_its_name_and_its_papers(settings, method, papers):
    text = render(data(settings))
    assert f"with {method}." in text
    assert re.findall(r"@inproceedings\{([a-z]+)\d", text) == papers
    assert text.count("k steps back, 1 step forward") == papers.count("mordido")


def test_the_settings_are_those_that_trained():
    text = render(data(dict(k=2, ascent="asam", target_parameters="attention", sync_ascent=False)))
    for name, value in dict(k=2, rho=0.5, alpha=0.5, eta=0.01, sync_ascent=False).items():
        assert re.search(rf"\| {name} +\| {value} ", text), name
    assert "attention" in text and "eta" not in render(data(dict(k=2)))


NOISE = [{"sigma": 0.1, "mean": 0.5, "sd": 0.02, "worst": 0.4, "values": [0.5]}]
RECORD = {"model": "reviews", "metric": "accuracy", "split": "test", "examples": 40, "value": 0.75}
HOW = {"noise_kind": "additive", "draws": 3, "sharpness_kind": "worst", "sharpness_steps": 7, "adaptive": False}
HOW |= {"max_examples": 32}


def test_measured_flatness_is_in_the_card_and_what_is_missing_is_called_not_measured(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    measured = RECORD | {"sharpness": [{"rho": 0.05, "rise": 0.25}], "hessian_eigenvalues": [12.5]}
    write_flatness(tmp_path, [measured | {"weight_noise": NOISE}], HOW, {"noise.png": "Accuracy against noise"})
    text = save(data(), tmp_path).read_text()
    assert re.search(r"\| rise of the loss within rho 0.05 +\| 0.25 ", text) and "0.500 +- 0.020" in text
    assert "12.5" in text and "![Accuracy against noise](noise.png)" in text and "not measured" not in text
    assert "additive" in text and "over 3 draws" in text and "worst case, 7 ascent steps; 32 examples" in text
    write_flatness(tmp_path, [RECORD | {"weight_noise": NOISE}], HOW)
    text = save(data(), tmp_path).read_text()
    assert "Sharpness: not measured" in text and "0.500 +- 0.020" in text and "noise.png" not in text


def test_what_was_measured_of_other_weights_or_cannot_be_read_is_not_in_the_card(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    path = write_flatness(tmp_path, [RECORD | {"weight_noise": NOISE}], HOW)
    (tmp_path / "model.safetensors").write_bytes(b"of a later training")
    assert "0.500" not in save(data(), tmp_path).read_text()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert "0.500" in save(data(), tmp_path).read_text()
    path.write_text("{")
    with pytest.warns(LookbehindWarning, match="flatness.json cannot be read"):
        assert "Sharpness and robustness to noisy weights: not measured" in save(data(), tmp_path).read_text()


COMPARISON = [
    MethodRuns("Lookbehind-SAM", "k=2", 10, 30, {"accuracy": [0.7, 0.72, 0.74]}),
    MethodRuns("AdamW", "k=0", 10, 10, {"accuracy": [0.5, 0.5, 0.8]}),
    MethodRuns("SAM, longer", "k=1", 15, 30, {"accuracy": [0.75]}),
    MethodRuns("AdamW, longer", "k=0", 60, 60, {"accuracy": [0.6]}),
]


def test_a_comparison_says_seeds_spread_and_budget_of_each_method():
    known = data(**KNOWN | {"comparison": COMPARISON})
    text = render(known)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "k=" in line]
    assert rows == [
        ["**Lookbehind-SAM**", "k=2", "3 seeds", "0.720\u00a0±\u00a00.020", "30"],
        ["AdamW", "k=0", "3 seeds", "0.600\u00a0±\u00a00.173", "10, equal steps"],
        ["SAM, longer", "k=1", "single run", "0.750", "30, equal gradients"],
        ["AdamW, longer", "k=0", "single run", "0.600", "60, 2x"],
    ]
    # of the saved model alone
    assert known.metadata().eval_results == data(**KNOWN).metadata().eval_results


def test_a_saved_card_is_written_again_from_its_data(tmp_path):
    known = data(dict(k=3, ascent="asam", target_parameters=["a", "b"]), **KNOWN | {"sections": {"More": "words"}})
    text = save(known, tmp_path).read_text()
    assert save(load(tmp_path), tmp_path).read_text() == text and not (tmp_path / "README.backup.md").exists()
    again = save(replace(load(tmp_path), comparison=COMPARISON), tmp_path).read_text()
    assert "**Lookbehind-SAM**" in again and "**Lookbehind-SAM**" not in text
    assert load(tmp_path) == replace(known, comparison=COMPARISON)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("{", "card.json"),
        ("[]", "card.json"),
        ("{}", "it needs model_name and settings"),
        ('{"model_name": "a", "settings": {"k": -1}}', "k=-1"),
        ('{"model_name": "a", "settings": {}, "colour": "red"}', "unknown keys colour"),
        ('{"model_name": "a", "settings": {}, "results": [{}]}', "card.json"),
    ],
)
def test_data_of_no_card_are_bad_input(tmp_path, content, message):
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_the_license_is_that_of_the_base_model_or_none(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert license_of(str(tmp_path), ask=False) == "mit" and license_of(None, ask=True) is None
    assert license_of(str(tmp_path / "gone" / "long" / "ago"), ask=True) is None
    hub.repos["user/base"] = Repo(files={"README.md": b"---\nlicense: apache-2.0\n---\n"})
    assert license_of("user/base", ask=False) is None and hub.requests == []
    assert license_of("user/base", ask=True) == "apache-2.0"
    assert license_of("user/none", ask=True) is None


@pytest.mark.parametrize(
    "fault", [dict(status=503), dict(hang=True), dict(drop=True), dict(status=200, body=b"<html>")]
)
def test_a_hub_that_fails_leaves_the_license_out_in_time(hub, monkeypatch, fault):
    monkeypatch.setattr("hf_lookbehind.hub.card.license.DEADLINE", 1.0)
    hub.repos["user/base"] = Repo()
    hub.fail("info", **fault)
    start = time.monotonic()
    assert license_of("user/base", ask=True) is None and time.monotonic() - start < 5


def test_what_a_user_wrote_or_edited_is_kept_beside_the_card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    save(data(), tmp_path)
    assert (tmp_path / "README.backup.md").read_text() == "# Mine\n"
    # our own is replaced, as long as it is our own
    save(data(dict(k=5)), tmp_path)
    assert len(list(tmp_path.glob("README*"))) == 2 and "| k " in path.read_text()
    edited = path.read_text().replace("trained", "TRAINED")
    path.write_text(edited)
    save(data(), tmp_path)
    assert (tmp_path / "README.backup2.md").read_text() == edited and "TRAINED" not in path.read_text()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--hub_token", "abc"], ["--hub_token", "REDACTED"]),
        (["--hub_token=abc"], ["--hub_token=REDACTED"]),
        (["--token", "abc", "def"], ["--token", "REDACTED", "REDACTED"]),
        (["--hub-token", "abc", "--k", "2"], ["--hub-token", "REDACTED", "--k", "2"]),
        (["--password=a=b"], ["--password=REDACTED"]),
        (["--tokenizer_name", "user/model"], ["--tokenizer_name", "user/model"]),
        (["--dataset_name", "hf_abcdefghij"], ["--dataset_name", "REDACTED"]),
        (["--dataset_name", "hf_lookbehind2"], ["--dataset_name", "REDACTED"]),
        (["--output_dir", "runs/hf_lookbehind"], ["--output_dir", "runs/hf_lookbehind"]),
        (["--output_dir", "/home/jane/my runs/a"], ["--output_dir", "a"]),
        (["--output_dir=~/runs/a"], ["--output_dir=a"]),
        (["--output_dir", "../../jane/runs"], ["--output_dir", "runs"]),
        (["--train_dir", r"C:\Users\jane\data"], ["--train_dir", "data"]),
        (["--output_dir", "runs/a"], ["--output_dir", "runs/a"]),
        (["--optim_args", "path=/home/jane/x,lr=1/2"], ["--optim_args", "path=x,lr=1/2"]),
        (["--lr_scheduler_kwargs", '{"file": "/home/jane/x"}'], ["--lr_scheduler_kwargs", '{"file": "x"}']),
        (["--hub", "https://jane:pw@host/path"], ["--hub", "https://host/path"]),
    ],
)
def test_a_command_line_tells_no_secret_and_no_path_of_the_machine(words, expected):
    assert redact_flags(words) == expected


def test_a_text_tells_no_token():
    assert redact("with hf_abcdefghij, see https://huggingface.co/user/model") == (
        "with REDACTED, see https://huggingface.co/user/model"
    )


def test_a_word_that_needs_quotes_has_a_line_of_its_own_too():
    words = ["--k", "2", "--train_split=train[:9]", "--hub_token", "x", "--output_dir", "my runs"]
    lines = command("hf-lookbehind clm", words, leave_out=["--hub_token"]).split(" \\\n    ")
    assert lines == ["hf-lookbehind clm", "--k 2", "'--train_split=train[:9]'", "--output_dir 'my runs'"]
