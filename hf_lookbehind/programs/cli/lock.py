"""One run at a time in a folder: a lock that goes with the process that holds it, however that ends."""

import errno
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from ...config import InputError, LookbehindWarning

LOCK_NAME = ".lock"
# What a disk without locks answers, such as some that are reached over a network.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def hold(folder: Path, said: str = "--output_dir") -> AbstractContextManager[object]:
    """Hold an existing folder until the block is left.

    The system lifts the lock of a process that is killed. Other machines see it as far as the disk tells them of
    locks; one that knows no locks is warned of.

    Args:
        folder: of a run.
        said: how a message calls it.

    Raises:
        InputError: another process holds it, or it cannot be locked.
    """
    try:
        return FileLock(folder / LOCK_NAME, timeout=0).acquire()
    except Timeout as error:
        raise InputError(
            f"{said} {str(folder)!r} is in use: another run is going on there. Wait for its end, or give "
            "another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(f"{said} {str(folder)!r} cannot be locked: {error.strerror}") from error
        problem = f"{folder} is on a disk without locks: nothing keeps another run out of it"
        warnings.warn(problem, LookbehindWarning, stacklevel=2)
        return nullcontext()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds; nothing is written.

    Raises:
        InputError
    """
    if (folder / LOCK_NAME).exists():
        with hold(folder):
            pass
