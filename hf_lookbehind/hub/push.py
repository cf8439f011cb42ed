"""Pushing a trained model to the Hub: what may be shared, within a deadline, and never at the cost of the training."""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import InputError
from . import file_names as names
from .files import contents

logger = logging.getLogger(__name__)

# Of what is left out, so many are named.
NAMED = 20
UPLOAD = Path(__file__).with_name("upload.py")
# Seconds for a question and its answer.
CHECK_DEADLINE = 30.0
# A push may take this long, and a second more for each megabyte.
PUSH_SECONDS, BYTES_PER_SECOND = 300.0, 1e6
# Eleven days: longer ones do not fit into what the system waits for.
MOST_SECONDS = 1e6


class NotPushedError(Exception):
    """The Hub cannot be reached, refuses, or does not answer in time; the message says which, in one line."""


class Pushed(NamedTuple):
    """A repository's id, with its user's name; URL and hash of the commit (after a check: its own URL, and "")."""

    repo_id: str
    url: str
    oid: str


class Push:
    """An upload that goes on in a process of its own; `wait` for it, or `kill` it.

    Args:
        request: what `upload.py` is asked for.
        deadline: seconds from now.
    """

    def __init__(self, request: dict[str, Any], deadline: float) -> None:
        self.deadline = deadline
        self._end = time.monotonic() + deadline
        is_shown = sys.stderr.isatty() and os.isatty(2)
        bars = {} if is_shown else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            # -P: the modules beside it are not its own
            [sys.executable, "-P", str(UPLOAD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if is_shown else subprocess.PIPE,
            env=os.environ | bars,
        )
        # at once, so that it goes on while nobody waits
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # pyright: ignore[reportOptionalContextManager]
            stdin.write(json.dumps(request).encode())
        self._process.stdin = None

    def wait(self, seconds: float | None = None) -> Pushed | None:
        """What came of it, or None where nothing has after `seconds`. Default: until the deadline.

        Raises:
            NotPushedError: it failed, or the deadline has passed.
        """
        left = self._end - time.monotonic()
        try:
            # in no time at all, what has been answered would not be read
            timeout = max(left if seconds is None else min(seconds, left), 0.02)
            answer, errors = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as timeout:
            if time.monotonic() < self._end:
                return None
            self.kill()
            problem = f"the Hub has not answered, or not as it should, within {self.deadline:g} seconds"
            raise NotPushedError(problem) from timeout
        except BaseException:
            self.kill()
            raise
        if self._process.returncode != 0:
            last = (errors or b"").decode(errors="replace").strip().splitlines()[-1:]
            raise NotPushedError(f"the upload ended with exit code {self._process.returncode}: {''.join(last)}")
        found = json.loads(answer.splitlines()[-1])
        if "error" in found:
            raise NotPushedError(found["error"])
        return Pushed(**found)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def check_repo_id(repo_id: str) -> None:
    """Refuse what no repository can be called.

    Raises:
        InputError
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not the name of a repository: USER/NAME or NAME is needed") from error


def check_deadline(name: str, deadline: float | None) -> None:
    """Refuse a deadline that no clock can keep; `name` is what it was given as.

    Raises:
        InputError
    """
    if deadline is not None and not 0 < deadline <= MOST_SECONDS:
        raise InputError(
            f"{name} {deadline} is not allowed: a number of seconds, more than 0, at most {MOST_SECONDS:g}"
        )


def check_write_access(
    repo_id: str, token: str | None = None, *, private: bool | None = None, deadline: float = CHECK_DEADLINE
) -> str:
    """Create a model repository, if there is none, and make sure that it may be written: before hours of training.

    Args:
        repo_id: "user/name", or "name" for the token's own user.
        token: default: `HF_TOKEN`, or the stored login.
        private: whether a new repository is. Default: what the user, or the organization, has set.
        deadline: in seconds. Default: 30.

    Returns:
        The id with the user's name.

    Raises:
        InputError: no repository can have such a name.
        NotPushedError: the Hub cannot be reached, refuses, or does not answer in time.
    """
    check_repo_id(repo_id)
    done = Push(_request(repo_id, token, private), deadline).wait()
    assert done is not None
    return done.repo_id


def start_push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    deadline: float | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> Push:
    """`push_folder`, without waiting for its end."""
    check_repo_id(repo_id)
    check_deadline("deadline", deadline)
    (files, left_out), root = contents(folder), Path(folder).expanduser().absolute()
    if left_out:
        said = [f"{name!r} ({why})" for name, why in left_out.items()]
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        logger.warning(f"not pushed of {folder}: {'; '.join(said[:NAMED])}{more}")
    if deadline is None:
        deadline = PUSH_SECONDS + sum((root / name).stat().st_size for name in files) / BYTES_PER_SECOND
    request = _request(repo_id, token, private)
    request |= {"folder": str(root), "files": files, "revision": revision, "commit_message": commit_message}
    request["replaced"] = _replaced(files)
    return Push(request, deadline)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    deadline: float | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Upload a saved model: the files that `files_to_push` gives, and never anything else.

    What an earlier push has left in the repository and would be loaded instead of these files is removed from its
    head. A line of the log says what in the folder is left out, and why; but for what a training always leaves: states
    of optimizers, `training_args.bin` (a pickle that holds the token), logs, hidden files. The repository is created
    if there is none.

    Args:
        folder: with a saved model, or saved adapters.
        repo_id: "user/name", or "name" for the token's own user.
        token: default: `HF_TOKEN`, or the stored login.
        private: whether a new repository is. Default: what the user, or the organization, has set.
        deadline: in seconds, after which the upload is ended. Default: 300, and one more for each megabyte.
        revision: branch, created if there is none. Default: main.
        commit_message: default: "Upload model".

    Returns:
        The commit, which is its URL as a text.

    Raises:
        InputError: the folder holds no model, one that nobody could load, two, or the working directory.
        NotPushedError: the Hub cannot be reached, refuses, or does not answer in time.
    """
    upload = start_push(
        folder,
        repo_id,
        token=token,
        private=private,
        deadline=deadline,
        revision=revision,
        commit_message=commit_message,
    )
    done = upload.wait()
    assert done is not None
    return CommitInfo(commit_url=done.url, commit_message=commit_message, commit_description="", oid=done.oid)


def push_command(folder: str | Path, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """The command that pushes the folder later.

    Example:
        >>> push_command("runs/my model", "user/model", revision="v2")
        "hf-lookbehind push 'runs/my model' user/model --revision v2"
    """
    words = ["hf-lookbehind", "push", str(folder), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision is not None else []
    return shlex.join(words)


def _replaced(files: Sequence[str]) -> list[str]:
    """Patterns of what an earlier push may have left, and would be loaded instead of these files, or with them.

    An earlier model in one file, where this one is in several; adapters, where it is a whole one; a vocabulary of
    another form. Weights of a whole model stay where adapters are pushed: they may be those of their base.
    """
    kinds = {names.WEIGHTS: (*names.WEIGHTS, *names.ADAPTER), names.TOKENIZER: names.TOKENIZER}
    return [p for kind, replaced in kinds.items() if any(names.is_one_of(f, kind) for f in files) for p in replaced]


def _request(repo_id: str, token: str | None, private: bool | None) -> dict[str, Any]:
    return {"repo_id": repo_id, "token": token, "private": private, "files": []}
