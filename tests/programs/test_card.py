"""What a program finds out for the card of a run."""

import pytest
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from hf_lookbehind.programs.card import revision_of
from hf_lookbehind.trainer.card import card_data
from tests.training import make_trainer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "folder, revision",
    [(COMMIT, COMMIT), (COMMIT[:39], None), (COMMIT + "0" * 24, None)],
    ids=["a commit", "too short", "the hash of code that reads local files"],
)
def test_the_revision_of_data_is_the_commit_that_their_cache_is_named_by(tmp_path, folder, revision):
    (tmp_path / folder).mkdir()
    path = str(tmp_path / folder / "name-train.arrow")
    with ArrowWriter(path=path) as writer:
        for i in range(4):
            writer.write({"n": i})
        writer.finalize()
    dataset = Dataset.from_file(path)
    assert revision_of(dataset) == revision
    assert revision_of(dataset.select([0, 2]).map(lambda row: {"m": row["n"] + 1})) == revision


def test_data_in_memory_have_no_revision():
    assert revision_of(Dataset.from_dict({"n": [1]})) is None and revision_of([{"n": 1}]) is None


def test_what_a_training_has_cost_is_in_words(tmp_path):
    trainer = make_trainer(tmp_path, dict(k=2), max_steps=2)
    before = card_data(trainer).cost["peak memory"]
    held = torch.zeros(2**28, dtype=torch.uint8) + 1
    cost = card_data(trainer).cost
    assert cost["gradient passes per step"] == "3" and "CPU" in cost["hardware"]
    if not torch.cuda.is_available():
        unit = " GiB resident, of the whole process so far"
        gibibytes = [float(text.removesuffix(unit)) for text in (before, cost["peak memory"])]
        assert gibibytes[1] >= max(gibibytes[0], 0.25)
    assert held.sum()
