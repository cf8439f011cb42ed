"""The recipes are settings of their programs, and the pages name them."""

from pathlib import Path

import pytest

from hf_lookbehind.scripts.run_clm import make_parser as clm
from hf_lookbehind.scripts.run_image_classification import make_parser as image_classification
from hf_lookbehind.scripts.run_lifelong_text import PROGRAM as LIFELONG_TEXT
from hf_lookbehind.scripts.run_seq2seq import make_parser as seq2seq
from hf_lookbehind.scripts.run_text_classification import make_parser as text_classification

ROOT = Path(__file__).parents[2]
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
