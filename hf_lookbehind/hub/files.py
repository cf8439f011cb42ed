"""Which files of a folder are a model: those that can be shared, those that are left out, and whether it is whole."""

import os
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import NamedTuple

from ..config import InputError
from . import file_names as names
from .modules import adapter_folders, images_of_card, index_shards, module_folders
from .whole import NEEDS_BASE, what_is_missing

__all__ = ["NEEDS_BASE", "Contents", "check_folder_to_push", "contents", "files_to_push"]


class Contents(NamedTuple):
    """What is shared of a folder: names with slashes, sorted; and what is not, with the reason."""

    shared: list[str]
    left_out: dict[str, str]


def files_to_push(folder: str | Path) -> list[str]:
    """The files of a trained model that can be shared: names in the folder, with slashes, sorted.

    Weights, config, tokenizer or processor, the folders of sentence-transformers' modules, adapters in folders of
    their own, card, results, figures, and images that the card shows. Hidden files, pickles, code, and links that lead
    out of the folder are none of them.

    Args:
        folder: with a saved model or saved adapters.

    Raises:
        InputError: it is no folder, it contains the working directory, it holds no model, one that was cut while being
            written, one that nobody could load from what is shared, or two of which it cannot be known which is meant.
    """
    return contents(folder).shared


def contents(folder: str | Path) -> Contents:
    """`files_to_push`, and what else is in the folder, with the reason why it is left out.

    What a training always leaves beside a model (checkpoints, states of optimizers, `training_args.bin`, logs, hidden
    files) is not named.
    """
    root = Path(folder).expanduser()
    check_folder_to_push(root)
    if not root.is_dir():
        raise InputError(f"{str(folder)!r} cannot be pushed: there is no such folder")
    try:
        found = sort_files(root)
        problem = what_is_missing(root, found.shared, found.left_out)
    except OSError as error:
        said = f"{error.filename or root} cannot be read: {error.strerror}"
        raise InputError(f"{str(folder)!r} cannot be pushed: {said}") from error
    if problem is not None:
        raise InputError(f"{str(folder)!r} cannot be pushed: {problem}")
    return found


def check_folder_to_push(folder: str | Path) -> None:
    """Refuse one that contains the working directory, where other work lies.

    Raises:
        InputError
    """
    root = Path(folder).expanduser().resolve()
    if Path.cwd().resolve().is_relative_to(root):
        raise InputError(
            f"{str(folder)!r} cannot be pushed: it contains the working directory; a model needs a folder of its own"
        )


def sort_files(root: Path) -> Contents:
    """Every file of a folder, whatever is missing there: shared, or left out and why.

    A folder may stand for all that is in it, with a slash at its end.
    """
    patterns, found = _patterns(root), Contents([], {})
    for name in _walk(root, patterns):
        reason = _why_not(root, name, patterns)
        if reason is None:
            found.shared.append(name)
        else:
            found.left_out[name] = reason
    return found


def _patterns(root: Path) -> list[str]:
    """All that is shared of this folder: what has a usual name, and what the folder itself names."""
    own = [
        *images_of_card(root),
        *index_shards(root),
        *(f"{a}/{n}" for a in adapter_folders(root) for n in names.ADAPTER),
    ]
    return [*names.SHARED, *map(escape, own), *(f"{escape(folder)}/**" for folder in module_folders(root))]


def _walk(root: Path, patterns: list[str], folder: str = "") -> Iterator[str]:
    """Names of files; and of folders that are of no interest, with a slash. What is private is passed over."""
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        name = folder + entry.name
        if names.is_private(name):
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield name
        elif names.may_hold_one_of(name, patterns):
            yield from _walk(root, patterns, f"{name}/")
        else:
            yield f"{name}/"


def _why_not(root: Path, name: str, patterns: list[str]) -> str | None:
    """Why a file is not shared, or None for one that is."""
    path = root / name
    if names.is_one_of(path.name, names.PICKLES):
        return "a pickle, which may run code where it is loaded"
    if path.suffix == ".py":
        return "code, which is never pushed"
    if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(root.resolve())):
        return "a link that leads out of the folder"
    if names.is_one_of(path.name, [names.SHARDS]) and not names.is_one_of(name, patterns):
        return f"a part of a model that no {names.INDEX_NAME} names"
    if name.endswith("/") or not names.is_one_of(name, patterns):
        return "no file of a model that is known"
    return None if path.is_file() else "no regular file"
