"""Which files of a folder are its images: one rule, at every depth. What the rule leaves out is counted, and said."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from datasets.data_files import SPLIT_KEYWORDS
from PIL import Image as PILImage

from ...config import InputError
from ..cli.running import is_main_process

# Formats whose suffixes Pillow knows, and that are documents, films or arrays: nothing that it decodes by itself.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# What systems put beside a user's files: unpacked archives of a Mac, thumbnails of a NAS, a disk's own folders.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}

BROKEN_LINK = "linked to nothing"

LeftOut = tuple[str, str]  # why, and the path


def image_folder(folder: str, flag: str) -> Dataset:
    """One folder per class, its images at any depth below it, in the order of their names.

    An image is a regular file, or a link to one, that is not hidden, not empty, readable, and of a format that Pillow
    reads here by its suffix. Linked folders are read as others are, each once in a class. How many files are left
    out, and why, is one line on stderr.

    Raises:
        InputError: the folder does not exist or cannot be read, has no folder per class, or a class has no image.
    """
    root, what = Path(folder).expanduser(), f"--{flag} {folder!r}"
    if not root.is_dir():
        raise InputError(f"{what}: there is no such folder")
    with _blaming(what):
        classes, left_out = _survey(root)
    if not classes:
        raise InputError(f"{what} has no folder per class: images belong in {root.name}/<class>/<image>")
    _check_classes(root, classes, left_out, what)
    if left_out and is_main_process():
        sys.stderr.write(f"{what}: {_said(left_out, root)}\n")
    labels = [label for label, paths in enumerate(classes.values()) for _ in paths]
    images = [{"bytes": None, "path": path} for paths in classes.values() for path in paths]
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def image_splits(folder: str, flag: str) -> dict[str, Dataset] | None:
    """A folder of class folders, or of splits (train, validation, test) with class folders each, read alike.

    Returns:
        The splits; None where the folder is of another kind, as with tables, metadata or other depths of folders.

    Raises:
        InputError: see `image_folder`.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        return None
    with _blaming(f"--{flag} {folder!r}"):
        splits = _split_folders(root)
        if _is_described(root) or not splits or not all(map(_holds_classes, splits.values())):
            return None
    return {split: image_folder(path, flag) for split, path in splits.items()}


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """What cannot be read in the block is named, after the flag that led there."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.filename!r} cannot be read ({error.strerror})") from error


def _split_folders(root: Path) -> dict[str, str]:
    """The folder of each split: the root itself is that of "train" where its folders are no splits."""
    folders = [entry for entry in _entries(root) if _is_folder(entry) and not _is_hidden(entry.name)]
    splits = {SPLITS[entry.name.lower()]: entry.path for entry in folders if entry.name.lower() in SPLITS}
    return splits if len(splits) == len(folders) else {"train": os.fspath(root)}


def _is_described(root: Path) -> bool:
    """Whether a folder is a saved dataset, or says itself what its files are."""
    if any((root / name).is_file() for name in ("dataset_dict.json", "state.json", ".huggingface.yaml")):
        return True
    readme = root / "README.md"
    return readme.is_file() and readme.read_bytes().startswith(b"---")


def _holds_classes(folder: str) -> bool:
    """Whether images lie in folders of a first level, and no metadata beside them says something else of them."""
    entries = [entry for entry in _entries(folder) if not _is_hidden(entry.name)]
    below = [each for entry in entries if _is_folder(entry) for each in _entries(entry.path) if not _is_folder(each)]
    suffixes = _suffixes()
    return any(_problem(entry, suffixes) is None for entry in below if not _is_hidden(entry.name)) and not any(
        entry.name.startswith("metadata.") for entry in (*entries, *below)
    )


def _survey(root: Path) -> tuple[dict[str, list[str]], list[LeftOut]]:
    """The images of each class, by its name, and what is left out."""
    suffixes = _suffixes()
    classes: dict[str, list[str]] = {}
    left_out: list[LeftOut] = []
    for entry in _entries(root):
        if _is_hidden(entry.name):
            left_out += _hidden(entry)
        elif _is_folder(entry):
            seen = {_identity(os.fspath(root))}
            classes[entry.name] = _images_below(entry.path, suffixes, seen, left_out)
        else:
            problem = _problem(entry, suffixes) or "beside the folders of the classes"
            left_out.append((problem, entry.path))
            if problem == BROKEN_LINK and "." not in entry.name:
                classes[entry.name] = []  # a folder was meant
    return classes, left_out


def _images_below(folder: str, suffixes: set[str], seen: set[tuple[int, int]], left_out: list[LeftOut]) -> list[str]:
    """The images in a folder and below it; `seen` are the folders not to be read (again), `left_out` grows."""
    images, folders = [], [folder]
    while folders:
        here = folders.pop()
        if _identity(here) in seen:
            left_out.append(("linked to a folder that is read already", here))
            continue
        seen.add(_identity(here))
        for entry in _entries(here):
            if _is_hidden(entry.name):
                left_out += _hidden(entry)
            elif _is_folder(entry):
                folders.append(entry.path)
            elif problem := _problem(entry, suffixes):
                left_out.append((problem, entry.path))
            else:
                images.append(entry.path)
    return sorted(images)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(folder: str) -> tuple[int, int]:
    """What a folder and all links to it share."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    # an entry that is linked to itself raises where a path does not
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _hidden(entry: os.DirEntry) -> Iterator[LeftOut]:
    """A hidden file, or all files in a hidden folder."""
    if entry.is_dir(follow_symlinks=False):
        for folder, _, names in os.walk(entry.path):
            yield from (("hidden", os.path.join(folder, name)) for name in sorted(names))
    else:
        yield "hidden", entry.path


def _problem(entry: os.DirEntry, suffixes: set[str]) -> str | None:
    """Why a visible file is no image, in the words of the line that is said."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return BROKEN_LINK
    if not entry.is_file():
        return "no regular file"
    if os.path.splitext(entry.name)[1].lower() not in suffixes:
        return "of no image format that Pillow reads here"
    if entry.stat().st_size == 0:
        return "empty"
    if not os.access(entry.path, os.R_OK):
        return "not readable"
    return None if _is_utf8(entry.path) else "with a name that is not UTF-8"


def _is_utf8(path: str) -> bool:
    """Whether a table can hold the path: what Python could not decode in it is there as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _suffixes() -> set[str]:
    """Of all formats that Pillow opens here, with the plugins that are registered."""
    known = PILImage.registered_extensions()
    return {suffix for suffix, form in known.items() if form in PILImage.OPEN and form not in NO_PICTURES}


def _check_classes(root: Path, classes: dict[str, list[str]], left_out: list[LeftOut], what: str) -> None:
    """Refuse classes without an image, and folders that are splits rather than classes."""
    names = [name for name, paths in classes.items() if not paths]
    if names:
        below = [(why, path) for why, path in left_out if Path(path).relative_to(root).parts[0] in names]
        said = f" ({_said(below, root)})" if below else ""
        raise InputError(
            f"{what}: there is no image in {', '.join(map(repr, names))}{said}: add some, or remove the folder"
        )
    direct = {os.path.dirname(path) for paths in classes.values() for path in paths}
    if all(name.lower() in SPLITS and os.fspath(root / name) not in direct for name in classes):
        raise InputError(f"{what} holds splits, not classes: give one of {', '.join(map(repr, classes))} in it")


def _said(left_out: list[LeftOut], root: Path) -> str:
    """How many files are left out: a number and an example for each reason."""
    reasons: dict[str, list[str]] = {}
    for why, path in left_out:
        reasons.setdefault(why, []).append(path)
    listed = [
        f"{len(paths)} {why} ({os.path.relpath(paths[0], root)!r}{', ...' if len(paths) > 1 else ''})"
        for why, paths in reasons.items()
    ]
    return f"{len(left_out)} file{'s' if len(left_out) > 1 else ''} left out: {', '.join(listed)}"
