"""The cards in the repository are what the code makes of their data: `make cards` writes them."""

import getpass
import re
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_lookbehind.hub.card.render import load, save
from hf_lookbehind.hub.redact import redact
from hf_lookbehind.scripts.demo import __main__ as demo
from hf_lookbehind.scripts.demo import model_cards

FOLDERS = sorted(path for path in (Path(__file__).parents[3] / "model_cards").iterdir() if path.is_dir())


def test_there_is_one_for_each_method_of_the_demo():
    assert {folder.name for folder in FOLDERS} == {method.name for method in demo.DEMO_METHODS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_the_template_makes_of_its_data(folder, tmp_path):
    """If this fails, a template has changed: `make cards`."""
    for path in folder.iterdir():
        if path.name != "README.md":
            shutil.copyfile(path, tmp_path / path.name)
    assert save(load(tmp_path), tmp_path).read_bytes() == (folder / "README.md").read_bytes()
    assert (tmp_path / "card.json").read_bytes() == (folder / "card.json").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_whole_and_tells_nothing_of_the_machine(folder):
    card = ModelCard.load(folder / "README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {demo.VALIDATION_SPLIT, demo.TEST_SPLIT}
    figures = re.findall(r"!\[.+\]\((.+)\)", card.text)
    assert len(figures) == 2 and {path.name for path in folder.glob("*.png")} == set(figures)
    for path in folder.iterdir():
        if path.suffix == ".png":
            assert path.stat().st_size < 60_000
        else:
            text = path.read_text(encoding="utf-8")
            assert redact(text) == text
            assert not {getpass.getuser(), socket.gethostname()} & set(re.findall(r"[\w.-]+", text))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_has_no_empty_section(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\n##+ [^\n]+\n+(##+ |$)", re.sub(r"(?s)```.*?```", "code", text)) and "\n\n\n" not in text


def test_cards_are_copied_from_a_demo_with_smaller_pictures(tmp_path):
    source = tmp_path / "demo"
    shutil.copytree(FOLDERS[0].parent, source)
    picture = Image.effect_noise((1200, 800), 80).convert("RGB")
    picture.save(source / "sam" / "noise.png")
    assert model_cards.main([str(source), str(tmp_path / "cards")]) == 0
    for folder in FOLDERS:
        names = {path.name for path in folder.iterdir()}
        assert {path.name for path in (tmp_path / "cards" / folder.name).iterdir()} == names
        for name in ("README.md", "card.json", "flatness.json"):
            assert (tmp_path / "cards" / folder.name / name).read_bytes() == (folder / name).read_bytes()
    before, after = ((place / "sam" / "noise.png").stat().st_size for place in (source, tmp_path / "cards"))
    assert after < before / 2


@pytest.mark.parametrize("lacking", ["flatness.json", "card.json"])
def test_what_is_no_finished_demo_is_bad_input_and_nothing_is_written(tmp_path, capsys, lacking):
    source = shutil.copytree(FOLDERS[0].parent, tmp_path / "demo")
    for folder in FOLDERS:
        (source / folder.name / lacking).unlink()
    assert model_cards.main([str(source), str(tmp_path / "cards")]) == 2 and not (tmp_path / "cards").exists()
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and str(source) in printed
