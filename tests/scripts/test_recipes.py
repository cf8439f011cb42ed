"""The recipes are settings of their programs, and the pages name them."""

from pathlib import Path

import pytest

from hf_lookbehind.scripts import show_recipes
from hf_lookbehind.scripts.run_clm import make_parser as clm
from hf_lookbehind.scripts.run_image_classification import make_parser as image_classification
from hf_lookbehind.scripts.run_lifelong_text import PROGRAM as LIFELONG_TEXT
from hf_lookbehind.scripts.run_seq2seq import make_parser as seq2seq
from hf_lookbehind.scripts.run_text_classification import make_parser as text_classification

ROOT = Path(__file__).parents[2]
# Each with what its first lines tell the user to add.
RECIPES = {
    "vit_digits": (image_classification, []),
    "paper_lookbehind_sam": (image_classification, ["--dataset_name", "digits"]),
    "paper_lookbehind_asam": (image_classification, ["--dataset_name", "digits"]),
    "vit_finetune": (image_classification, ["--train_dir", "."]),
    "bert_classifier": (text_classification, ["--train_file", "a.csv"]),
    "lora_clm": (clm, ["--train_file", "a.txt"]),
    # instead of what they tell the user to fetch
    "lifelong_text": (LIFELONG_TEXT.make_parser, ["--model_name_or_path", "a/model", "--dataset_name", "a/dataset"]),
    "t5_seq2seq": (seq2seq, ["--train_file", "a.csv"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_settings_of_its_program(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("a.csv", "a.txt"):
        (tmp_path / file).write_text("x")
    make_parser, flags = RECIPES[name]
    args = make_parser().parse([f"{name}.yaml", *flags, "--output_dir", "out"])
    assert args.lookbehind.k >= 1 and args.lookbehind.rho is not None and args.training.learning_rate > 0
    assert not (tmp_path / "out").exists()


def test_every_recipe_is_tested_and_on_the_page_of_methods():
    found = {path.stem for path in (ROOT / "scripts" / "recipes").glob("*.yaml")}
    assert found == set(RECIPES)
    page = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"`{name}.yaml`" in page for name in found)


def test_they_are_listed_and_shown(capsys):
    assert show_recipes.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}.yaml" in listed for name in RECIPES) and "LoRA adapters of a causal language model" in listed
    assert show_recipes.main(["show", "lora_clm"]) == 0
    assert capsys.readouterr().out == (ROOT / "scripts" / "recipes" / "lora_clm.yaml").read_text()


@pytest.mark.parametrize("argv", [["show", "lora"], ["show"], ["print"]])
def test_a_recipe_that_there_is_not_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        show_recipes.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
