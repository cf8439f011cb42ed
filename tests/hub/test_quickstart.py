"""The first run of the quickstart, as it stands but for its length: from an empty folder to a card on the Hub."""

import importlib

from hf_lookbehind.programs.registry import module_name
from tests.caches import set_caches
from tests.scripts.test_commands import ROOT, commands

ONCE = "--max_steps 4 --eval_strategy no --save_strategy no --load_best_model_at_end false"
SHORT = {"image-classification": ONCE.split(), "flatness": ["--draws", "1"]}


def test_the_first_run_ends_with_a_card_on_the_hub(tmp_path, monkeypatch, hub, capsys):
    set_caches(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    of_the_user = {"photos", "reviews.csv", "book.txt"}
    first = [words for words in commands(ROOT / "docs" / "quickstart.md") if not of_the_user & {*words}]
    assert [words[0] for words in first] == [*["image-classification"] * 2, "flatness", "compare", "push"]
    for name, *flags in first:
        # a comparison takes longer than all others together, and has tests of its own
        if name != "compare":
            flags = [flag.replace("USER/", "user/") for flag in flags]
            code = importlib.import_module(module_name(name)).main([*flags, *SHORT.get(name, [])])
            assert code == 0, (name, capsys.readouterr().err)
    card = hub.repos["user/digits"].files["README.md"].decode()
    assert "| accuracy under weight noise 0.3 |" in card and "| accuracy with int4 weights" in card
