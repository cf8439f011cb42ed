"""What an earlier run left in the output folder: a run that starts there removes it, and nothing of anybody else's."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...config import InputError
from ...hub.card.measured import FLATNESS_NAME
from ...hub.card.render import DATA_NAME, is_generated
from ...hub.file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, SHARED, WEIGHTS
from ...trainer.hub import UPLOADING
from ..card import FIGURES
from ..cli.flags import Arguments
from ..cli.lock import check_free
from ..cli.paths import check_nothing_to_resume, exists, goes_on_in, resume_from
from ..cli.running import SEARCH_NAME, STATUS_NAME

FLATNESS_NAMES = (FLATNESS_NAME, "flatness.csv", "flatness.png", "compression.png")
# Of what is shared, this may be the user's own.
_MAYBE_THEIRS = (CARD_NAME, "LICENSE*", "NOTICE*", "*.png", "*_results.json")
# What the programs write, and what would be loaded with a model of theirs.
MODEL = tuple(name for name in SHARED if not any(fnmatchcase(name, pattern) for pattern in _MAYBE_THEIRS))
NAMES = (
    *MODEL, *WEIGHTS,
    "pytorch_model*.bin", "adapter_model.bin",
    "training_args.bin", "trainer_state.json", DATA_NAME,
    "all_results.json", "train_results.json", "eval_results.json", "test_results.json", "search_results.json",
    *FIGURES, "forgetting.png", "baseline.json", SEARCH_NAME, *FLATNESS_NAMES, UPLOADING,
)  # fmt: skip
_WEIGHTS = (*WEIGHTS, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
# What holds of one model, and not of what more steps make of it.
OF_ONE_MODEL = (*_WEIGHTS, *(name for name in NAMES if name.endswith("_results.json")), *FLATNESS_NAMES)


@dataclass(frozen=True)
class OutputFolder:
    """The folder of a run, which owns it from its start.

    Attributes:
        path: of the folder.
        inputs: what the run reads, by flag, paths among other values.
        goes_on: whether it continues what the folder holds.
    """

    path: Path
    inputs: Mapping[str, Any]
    goes_on: bool = False

    def check(self) -> None:
        """Can it be this run's own? Nothing is written.

        Raises:
            InputError: names what is in the way.
        """
        check_free(self.path)
        self._check_contents()

    def take_over(self, keep: Collection[str] = ()) -> None:
        """Remove what an earlier run left, unless this one goes on with it; called once the folder is held.

        Args:
            keep: names that stay anyway.

        Raises:
            InputError: names what is in the way, or cannot be removed.
        """
        self._check_contents()
        if not self.goes_on:
            remove_earlier_run(self.path, keep=keep)

    def _check_contents(self) -> None:
        if not self.goes_on:
            check_nothing_to_resume(self.path)
            check_earlier(self.path, inputs=self.inputs)


def output_folder(args: Arguments) -> OutputFolder:
    """That of a command line."""
    path = Path(args.training.output_dir or "")
    goes_on = goes_on_in(path, resume_from(args.training.resume_from_checkpoint))
    return OutputFolder(path, vars(args.data) | vars(args.model), goes_on)


def forget_model(folder: Path) -> None:
    """Remove the model so far and what holds of it: a run that was resumed has made another of it, to be saved now."""
    remove_earlier_run(folder, OF_ONE_MODEL)


def check_earlier(folder: Path, names: Collection[str] = NAMES, inputs: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder with what is of no run of ours, and would be overwritten, or be loaded with the model.

    Args:
        folder: of the output.
        names: patterns of what the run writes.
        inputs: what the run reads, by flag, paths among other values: a run would remove what it is to read.

    Raises:
        InputError: names the file.
    """
    is_ours = _is_status(folder / STATUS_NAME)
    there = list(_named(folder, (*names, STATUS_NAME)))
    for path in there:
        is_kind_of_ours = path.is_symlink() or path.is_dir() == (path.name == UPLOADING)
        if not (is_ours and is_kind_of_ours):
            raise InputError(
                f"--output_dir {str(folder)!r} holds {path.relative_to(folder)}, which is of no run of these "
                "programs: give another folder, or move it away"
            )
    doomed = {path.resolve() for path in there if path.exists()}
    for flag, value in (inputs or {}).items():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and exists(name) and Path(name).expanduser().resolve() in doomed:
                raise InputError(f"--{flag} {name!r} is not allowed: a run in that --output_dir overwrites it")


def remove_earlier_run(folder: Path, names: Collection[str] = NAMES, keep: Collection[str] = ()) -> None:
    """Remove what an earlier run of ours left; links themselves, and not what they lead to.

    A README.md that its user wrote or edited is kept.

    Args:
        folder: of the output, that `check_earlier` does not refuse.
        names: patterns of what goes.
        keep: names that stay anyway.

    Raises:
        InputError: names what cannot be removed.
    """
    for path in _named(folder, names):
        if path.name not in keep:
            _remove(path)
    if names is NAMES and is_generated(folder):
        _remove(folder / CARD_NAME)


def _named(folder: Path, patterns: Collection[str]) -> Iterator[Path]:
    """What has one of the names, in the folder itself, or in one below where the pattern says so."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        # fnmatch lets * match slashes
        if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns):
            yield path


def _is_status(path: Path) -> bool:
    """Whether it is a `run_status.json` of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"status", "exit_code", "message"} <= content.keys()


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError as error:
        raise InputError(f"{path}, of an earlier run, cannot be removed: {error.strerror}") from error
