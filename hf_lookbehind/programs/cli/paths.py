"""Folders that flags name: which can be read, written or resumed from. Looked at before anything is written."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config import InputError
from ...lifelong.runner import STREAM_NAME
from ...trainer.resume import last_complete_checkpoint, what_is_missing
from .running import STATUS_NAME

_TO_RESUME = ("checkpoint-*", STREAM_NAME, "task-[0-9]*")


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path rather than as `user/name` on the Hub."""
    parent = Path(name).expanduser().parent
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (parent != Path(".") and parent.is_dir())


def exists(name: str) -> bool:
    """Whether there is such a file or folder; False also for a name that no file can have."""
    return os.path.exists(os.path.expanduser(name))


def check_model_folder(flag: str, name: str, *, weights: bool) -> None:
    """Refuse a local folder that does not exist or holds no model; a Hub id is looked up later."""
    folder = Path(name).expanduser()
    if not exists(name):
        if looks_like_path(name):
            raise InputError(f"{flag} {name!r}: there is no such model folder")
        return
    if not folder.is_dir():
        raise InputError(f"{flag} {name!r} is a file: the folder of a saved model is needed")
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{flag} {name!r} holds adapters only: save the model with them merged into it (peft: merge_and_unload)"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {name!r} is not a model folder: it has no config.json")
    if weights and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise InputError(f"{flag} {name!r} has no weights: a model.safetensors is needed")


def check_folder_to_write(flag: str, name: str) -> None:
    """Refuse a folder that cannot be made or not be written to."""
    if not name.strip():
        raise InputError(f"{flag} {name!r} is not allowed: the name of a folder is needed")
    folder = Path(name).expanduser()
    if "\0" in name or any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise InputError(f"{flag} {name[:50]!r}... is not allowed: no file can have such a name")
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"{flag} {name!r} is not allowed: {str(nearest)!r} is a file")
    try:
        # permission bits do not bind root: only trying tells
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{flag} {name!r} is not writable: {error.strerror}") from error


def check_output_dir(name: str, resume: str | bool | None, inputs: Mapping[str, str | None]) -> None:
    """Can checkpoints be written, and which of those already there are wanted?

    Args:
        name: the folder.
        resume: as `resume_from` gives it.
        inputs: by flag, what is read: the folder must be none of them.
    """
    check_no_input(name, inputs)
    output_dir = Path(name).expanduser()
    if not goes_on_in(output_dir, resume):
        check_nothing_to_resume(output_dir)
    if resume is True and last_complete_checkpoint(output_dir) is None:
        raise InputError(f"--resume_from_checkpoint: {name!r} holds no complete checkpoint")
    if isinstance(resume, str):
        problem = what_is_missing(Path(resume))
        if problem is not None:
            raise InputError(f"--resume_from_checkpoint {resume!r} is no complete checkpoint: {problem}")


def check_no_input(name: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse an output folder that cannot be written, or is one of those that are read, under whatever name."""
    check_folder_to_write("--output_dir", name)
    output_dir = Path(name).expanduser()
    for flag, value in inputs.items():
        if value is not None and exists(value) and _is_same(output_dir, Path(value).expanduser()):
            raise InputError(f"--output_dir {name!r} is not allowed: it is the folder of --{flag}")


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one place, also where the first one is still to be made."""
    return path.resolve() == other.resolve() or (path.exists() and path.samefile(other))


def resume_from(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint` as `Trainer.train` takes it: a path, True for the last complete one, or None."""
    if value is None or value.lower() == "false":
        return None
    return True if value.lower() in ("last", "true") else value


def goes_on_in(output_dir: Path, resume: str | bool | None) -> bool:
    """Whether a run goes on with what its output folder holds; one that resumes from elsewhere starts a folder anew.

    Args:
        output_dir: of the run.
        resume: as `resume_from` gives it.
    """
    if not isinstance(resume, str):
        return resume is True
    return Path(resume).expanduser().resolve().is_relative_to(output_dir.expanduser().resolve())


def check_nothing_to_resume(output_dir: Path) -> None:
    """Refuse a folder that holds checkpoints or a stream of tasks: hours of work, which no other run touches.

    Raises:
        InputError: names what is there.
    """
    found = [path.name for pattern in _TO_RESUME for path in sorted(output_dir.glob(pattern))]
    if found:
        held = "a stream" if STREAM_NAME in found else found[-1]
        raise InputError(
            f"--output_dir {str(output_dir)!r} already holds {held}: give another folder, empty it, "
            "or continue with --resume_from_checkpoint last"
        )


def remove_earlier(root: Path, folders: Sequence[str], files: Sequence[str]) -> None:
    """Remove what an earlier run left: folders that hold a run, or nothing, and files.

    Raises:
        InputError: something there has one of the names, and is the user's own; nothing is removed.
    """
    for name in (*folders, *files):
        path = root / name
        ours = (_is_run(path) if name in folders else path.is_file()) and not path.is_symlink()
        if os.path.lexists(path) and not ours:
            raise InputError(f"{path} is in the way, and not of an earlier run: remove it, or choose another folder")
    for name in folders:
        if (root / name).exists():
            shutil.rmtree(root / name)
    for name in files:
        (root / name).unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    """Whether a folder holds one of our runs, or nothing."""
    return folder.is_dir() and ((folder / STATUS_NAME).is_file() or not any(folder.iterdir()))
