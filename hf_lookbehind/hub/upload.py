"""A process of its own that talks to the Hub, so that whatever hangs in there can be ended.

Run by path, with a request in JSON on stdin and the answer in JSON on stdout: tokens come that way because everyone
can see what stands on a command line. Imports nothing of the package, which would take seconds.
"""

import json
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import logging
from huggingface_hub.utils._http import default_client_factory

# Seconds without a byte after which a request counts as failed; the library's own client waits forever.
SILENCE = 120


def run(request: dict[str, Any]) -> dict[str, str]:
    """Make sure that the repository exists and may be written; upload the files, if there are any.

    Args:
        request: `repo_id`, `token` and `private` (null: the library's defaults), `revision` (null: main), `folder`,
            `files` (names in it, posix), `replaced` (patterns: what else has such a name goes), `commit_message`.

    Returns:
        `repo_id`, with the user's name where it had none; `url`, of the repository or of the commit; its `oid`, or "".
    """
    api, files = HfApi(token=request["token"]), request["files"]
    repo = api.create_repo(request["repo_id"], private=request["private"], exist_ok=True)
    # a token that can only read passes the above if the repository exists
    api.auth_check(repo.repo_id, write=True)
    if not files:
        return {"repo_id": repo.repo_id, "url": str(repo), "oid": ""}
    if request["revision"] is not None:
        api.create_branch(repo.repo_id, branch=request["revision"], exist_ok=True)
    there = api.list_repo_files(repo.repo_id, revision=request["revision"])
    old = {name for name in there for pattern in request["replaced"] if fnmatchcase(name, pattern)} - set(files)
    commit = api.create_commit(
        repo.repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(request["folder"], name)) for name in files),
            *(CommitOperationDelete(path_in_repo=name) for name in sorted(old)),
        ],
        commit_message=request["commit_message"],
        revision=request["revision"],
    )
    return {"repo_id": repo.repo_id, "url": commit.commit_url, "oid": commit.oid}


def describe(error: BaseException, repo_id: str) -> str:
    """What went wrong, in a line."""
    # uploads wrap the error that they met
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: the Hub is not asked"
    if status == 401:
        return "the Hub does not accept the token, or there is none: `hf auth login`, or HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id}: it needs the role write, and the rights there"
    if status == 404:
        return f"the Hub knows no repository {repo_id}, or not this branch of it"
    if status is not None:
        return f"the Hub answers with the status {status}"
    if isinstance(cause, json.JSONDecodeError):
        return "the Hub answers with something that is not JSON"
    text = " ".join(str(cause).split())[:300]
    unreached = type(cause).__module__.startswith("httpx")
    return f"the Hub cannot be reached: {text}" if unreached else f"{type(cause).__name__}: {text}"


def patient_client() -> Any:
    client = default_client_factory()
    client.timeout = SILENCE
    return client


def main() -> None:
    # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = json.load(sys.stdin)
    set_client_factory(patient_client)
    logging.set_verbosity_error()
    try:
        answer = run(request)
    except Exception as error:
        # the top of the process: its answer is all that the parent sees
        answer = {"error": describe(error, request["repo_id"])}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
