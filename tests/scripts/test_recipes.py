"""The recipes are settings of their programs, and the pages name them."""

import json
from pathlib import Path

import pytest
from transformers import ResNetConfig

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.scripts import run_image_classification, show_recipes
from hf_lookbehind.scripts.run_clm import make_parser as clm
from hf_lookbehind.scripts.run_image_classification import make_parser as image_classification
from hf_lookbehind.scripts.run_lifelong_text import PROGRAM as LIFELONG_TEXT
from hf_lookbehind.scripts.run_seq2seq import make_parser as seq2seq
from hf_lookbehind.scripts.run_text_classification import make_parser as text_classification

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "recipes"
# Each with what its first lines tell the user to add.
RECIPES = {
    "vit_digits": (image_classification, []),
    "vit_finetune": (image_classification, ["--train_dir", "."]),
    "bert_classifier": (text_classification, ["--train_file", "a.csv"]),
    "lora_clm": (clm, ["--train_file", "a.txt"]),
    # instead of what they tell the user to fetch
    "lifelong_text": (LIFELONG_TEXT.make_parser, ["--model_name_or_path", "a/model", "--dataset_name", "a/dataset"]),
    "t5_seq2seq": (seq2seq, ["--train_file", "a.csv"]),
}
# The methods of the papers on images: what the row of docs/methods.md says, and nothing else.
SAM = {"k": 1, "alpha": 1, "rho": 0.05}
LOOKBEHIND = {"k": 2, "alpha": 0.5, "rho": 0.05}
PAPERS = {
    "sam": SAM,
    "asam": SAM | {"ascent": "asam", "rho": 0.5, "eta": 0.01},
    "fisher_sam": SAM | {"ascent": "fisher", "eta": 1},
    "multistep_sam": {"k": 2, "descent": "last", "rho": 0.05},
    "lookbehind_sam": LOOKBEHIND,
    "lookbehind_asam": LOOKBEHIND | {"ascent": "asam", "rho": 0.5, "eta": 0.01},
    "lookbehind_adaptive": LOOKBEHIND | {"alpha": "adaptive"},
    # --method matched makes SAM of it: (k+1) rho / 2
    "matched_sam": {"k": 1, "alpha": 1, "rho": 1.5 * 0.05},
    "lookahead": {"k": 0},
    "lookahead_sam": SAM,
    "sam_on": SAM | {"rho": 0.5, "target_parameters": "norm|bn"},
    "sam_every_5": SAM | {"ascent_every": 5},
}
QUICKLY = ("sam", "asam", "lookbehind_adaptive", "matched_sam", "lookahead", "sam_on")
QUICK = ["--dataset_name", "digits", "--test_split", "train[:8]", "--max_train_samples", "16", "--max_steps", "2"]
QUICK += ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--disable_tqdm", "true"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_settings_of_its_program(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("a.csv", "a.txt"):
        (tmp_path / file).write_text("x")
    make_parser, flags = RECIPES[name]
    args = make_parser().parse([f"{name}.yaml", *flags, "--output_dir", "out"])
    assert args.lookbehind.k >= 1 and args.lookbehind.rho is not None and args.training.learning_rate > 0
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config of the library's residual networks, for flags that ask for a large one."""
    folder = tmp_path_factory.mktemp("tiny")
    ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_a_paper_is_its_row(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = image_classification().parse([f"{name}.yaml", "--output_dir", "out"])
    assert args.lookbehind.differences(LookbehindConfig(**PAPERS[name])) == []
    assert args.training.lookahead_steps == (5 if "lookahead" in name else 0)


# The others differ from one of these in settings of the method alone, which have tests of their own.
@pytest.mark.parametrize(
    "name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in PAPERS]
)
def test_a_recipe_of_a_paper_trains(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    flags = [f"{name}.yaml", *QUICK, "--config_name", tiny, "--output_dir", "out"]
    assert run_image_classification.main(flags) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    passes = LookbehindConfig(**PAPERS[name]).gradient_passes(2)
    assert results["train_gradient_passes"] == passes and results["test_samples"] == 8


def test_what_the_authors_script_sets_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = image_classification().parse(["papers/lookbehind_sam.yaml", "--output_dir", "out"])
    training = args.training
    assert (training.optim, training.optim_args, training.learning_rate) == ("sgd", "momentum=0.9", 0.1)
    assert (training.weight_decay, training.per_device_train_batch_size, training.num_train_epochs) == (5e-4, 128, 200)
    # neither is what the program does by itself
    assert training.max_grad_norm == 0 and args.data.augmentation == "crop_flip"
    matched = image_classification().parse(["matched_sam.yaml", "--output_dir", "out"])
    assert matched.matches == args.lookbehind and matched.training.learning_rate == pytest.approx(0.19)


def test_the_recipe_of_t5_climbs_a_fourth_of_its_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("source,target\na,b\n")
    args = seq2seq().parse(["t5_sam.yaml", "--train_file", "pairs.csv", "--output_dir", "out"])
    row = LookbehindConfig(k=1, alpha=1, rho=0.15, ascent_fraction=0.25)
    assert args.lookbehind.differences(row) == [] and args.training.optim == "adafactor"
    assert args.training.per_device_train_batch_size * args.training.gradient_accumulation_steps == 128


def test_every_recipe_is_tested_and_on_the_page_of_methods():
    found, of_papers = ({path.stem for path in folder.glob("*.yaml")} for folder in (FOLDER, FOLDER / "papers"))
    assert found == set(RECIPES) and of_papers == {*PAPERS, "t5_sam"}
    assert not found & of_papers, "a bare name would be two"
    page = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"`{name}.yaml`" in page for name in found | of_papers)


def test_they_are_listed_and_shown(capsys):
    assert show_recipes.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}.yaml" in listed for name in RECIPES) and "LoRA adapters of a causal language model" in listed
    assert all(f"papers/{name}.yaml" in listed for name in PAPERS) and "accelerate/ddp.yaml" in listed
    assert show_recipes.main(["list", "lookahead"]) == 0
    assert capsys.readouterr().out.count(".yaml") == 2
    assert show_recipes.main(["show", "lora_clm"]) == 0
    assert capsys.readouterr().out == (FOLDER / "lora_clm.yaml").read_text()
    for name in ("sam.yaml", "papers/sam.yaml", "papers/sam"):
        assert show_recipes.main(["show", name]) == 0
        assert capsys.readouterr().out == (FOLDER / "papers" / "sam.yaml").read_text()


@pytest.mark.parametrize("argv", [["show", "lora"], ["show"], ["list", "no such word"], ["print"]])
def test_a_recipe_that_there_is_not_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        show_recipes.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
