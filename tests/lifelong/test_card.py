"""What a card says of a stream."""

from pathlib import Path

import pytest

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.hub import LookbehindCardData
from hf_lookbehind.hub.card.render import render
from hf_lookbehind.lifelong import SequenceResult
from hf_lookbehind.lifelong.card import stream_section

FOUND = SequenceResult(
    tasks=["films", "books"],
    matrix=[[0.9, 0.4], [0.6, 0.8]],
    baseline=[0.5, 0.3],
    steps=[10, 10],
    gradient_passes=[30, 40],
    runtime=[1.0, 1.0],
    final=Path("end"),
)
STREAM = {"scenario": "domain", "replay": "agem", "keep_optimizer": False}
MEMORY = {"memory_size": 20, "policy": "balanced", "replay_ratio": 0.5}


def cells(text):
    """First column to the others, of all tables."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest[0] if len(rest) == 1 else rest for first, *rest in rows}


def section(found=FOUND, **stream):
    settings = LookbehindConfig(k=2).resolved()
    return stream_section(found, STREAM | stream, settings, split="test", figure="forgetting.png")


def test_the_section_has_the_matrix_the_measures_and_the_figure():
    said = cells(section())
    assert said["films"] == ["90.0", "40.0"] and said["books"] == ["60.0", "80.0"]
    values = {name.partition(":")[0]: value for name, value in said.items()}
    assert values["average accuracy after the last task"] == "70.0" and values["learning accuracy"] == "85.0"
    assert values["forgetting"] == "30.0" and values["backward transfer"] == "-30.0"
    assert values["forward transfer"] == "10.0"
    *_, figure = section().split("\n\n")
    assert figure.startswith("![Heat map of the accuracy") and figure.endswith("](forgetting.png)")
    assert "85.0% just after it" in figure and "70.0% in the end" in figure


def test_the_memory_and_its_gradients_are_there_where_one_was_replayed():
    # 2 tasks of 10 steps with k + 1 gradients, and 10 more on the memory
    said = cells(section(**MEMORY))
    assert said["memory"] == "20 examples, balanced" and said["drawn from it for each example of a task"] == "0.5"
    assert said["gradients, in windows of a task's own examples"] == "70"
    assert said["of the gradients, on the memory"] == "10"
    assert not {"memory", "of the gradients, on the memory"} & set(cells(section(replay="joint")))


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
@pytest.mark.parametrize("replay", ["none", "replay", "joint"])
def test_every_kind_of_stream_is_called_by_its_name(scenario, replay):
    said = cells(section(scenario=scenario, replay=replay, keep_optimizer=True))
    assert said["scenario"].startswith(f"{scenario}-incremental: ")
    assert said["state of the optimizer"] == "kept from task to task"


def test_sections_follow_the_results_of_a_card():
    text = render(LookbehindCardData("m", LookbehindConfig().resolved(), sections={"First": "one", "Second": "two"}))
    assert text.index("\n## First\n\none\n\n## Second\n\ntwo\n\n## How it was trained") > 0
