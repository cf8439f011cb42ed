"""A cache for what is made of local files, which knows them by more than path and time stamp."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from datasets import config
from datasets.fingerprint import Hasher

# What datasets keeps beside the data of `save_to_disk`, and while it is being written.
_OWN = ("cache-*.arrow", "tmp????????")


def cache_for(path: Path, cache_dir: str | None) -> str:
    """A folder below the cache of datasets, another one whenever the file, or one in the folder, has changed.

    `load_dataset` tells a file by its path and time stamp, which `cp -p`, `rsync -t`, `tar` and `unzip` bring along.

    Args:
        path: of what is read.
        cache_dir: the cache. Default: that of datasets.
    """
    return os.path.join(cache_dir or config.HF_DATASETS_CACHE, "local", state_of(path))


def state_of(path: Path) -> str:
    """A digest, another one after each change: the system sets the time of a change, and lets nobody else set it."""
    files = sorted(_below(path)) if path.is_dir() else [os.fspath(path)]
    return Hasher.hash([(os.path.abspath(file), *_state(file)) for file in files])


def _state(file: str) -> tuple[int, int, int, int]:
    found = os.stat(file) if os.path.exists(file) else os.lstat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _below(root: Path) -> Iterator[str]:
    """All files, also in linked folders, each of which is entered once; without what datasets keeps there itself."""
    entered = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
        subfolders[:] = [name for name in subfolders if real[name] not in entered]
        entered |= set(real.values())
        yield from (os.path.join(folder, name) for name in names if not any(fnmatchcase(name, own) for own in _OWN))
