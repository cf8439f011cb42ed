"""A training in the card as it went: its cost, its commands, and where settings changed on the way."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..report import format_table
from ..trainer.card import memory_in_words
from ..trainer.record import Part, TrainingRecord

TITLE = "Resumed under other settings"
_UNKNOWN = "not recorded"


def cost(record: TrainingRecord) -> dict[str, str]:
    """Of all parts, as far as it was recorded; nothing where no training was."""
    if not record.steps:
        return {}
    runtime = f"{record.runtime:.3g} s" if record.runtime else "not measured"
    return {
        "gradient passes per step": f"{record.passes / record.steps:.3g}",
        "wall time of the training": runtime,
        "peak memory": memory_in_words(record.peak_memory),
    }


def length_of(trainer: Any, planned: str) -> dict[str, str]:
    """How long the training was meant to be, and where it has ended before."""
    step, steps = trainer.state.global_step, trainer.state.max_steps
    return {"length": f"{planned}, ended early after step {step} of {steps}"} if 0 < step < steps else {}


def commands(parts: Sequence[Part]) -> str:
    """What makes the model: the command of each part, and where it takes over; nothing where none was recorded."""
    if not any(part.command for part in parts):
        return ""
    ends = _ends(parts)
    lines = [parts[0].command or f"# {ends[0]} steps, of which no command was recorded"]
    for end, part in zip(ends, parts[1:], strict=False):
        lines.append(f"# from the checkpoint of step {end} on\n{part.command}")
    return "\n\n".join(lines)


def parts_section(parts: Sequence[Part]) -> dict[str, str]:
    """A section on the parts, by its title; none where one is all."""
    if len(parts) < 2:
        return {}
    names = sorted({name for part in parts[:-1] for name in part.differences(parts[-1].settings)})
    rows = [_row(part, end, names) for part, end in zip(parts, _ends(parts), strict=True)]
    return {TITLE: f"The settings below are those of the last part.\n\n{format_table(rows)}"}


def _row(part: Part, end: int, names: Sequence[str]) -> dict[str, str]:
    first = end - part.steps + 1
    settings = {name: str(part.settings.get(name, _UNKNOWN)) for name in names}
    return {
        "steps": f"{first} to {end}" if first < end else f"{end}",
        **settings,
        "gradient passes": f"{part.passes:g}",
    }


def _ends(parts: Sequence[Part]) -> list[int]:
    """The last step of each part."""
    return list(accumulate(part.steps for part in parts))
