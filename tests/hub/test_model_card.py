"""Cards: what they say, what their metadata are, whose README stays."""

import re

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_lookbehind.config import LookbehindConfig
from hf_lookbehind.hub import LookbehindCardData, Result
from hf_lookbehind.hub.model_card import render, save
from hf_lookbehind.hub.redact import redact, redact_flags


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


def test_measured_flatness_is_a_table():
    noise = [{"sigma": 0.1, "mean": 0.5, "sd": 0.02, "worst": 0.4, "values": [0.5]}]
    text = render(data(sharpness=[{"rho": 0.05, "rise": 0.25}], weight_noise=noise))
    assert "| rise of the loss within rho 0.05 | 0.25 " in text and "0.5000 +- 0.0200" in text
    assert "not measured" not in text


def test_what_a_user_wrote_or_edited_is_kept_beside_the_card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    save(data(), tmp_path)
    assert (tmp_path / "README.backup.md").read_text() == "# Mine\n"
    # our own is replaced, as long as it is our own
    save(data(dict(k=5)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and "| k " in path.read_text()
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
