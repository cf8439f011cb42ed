"""Children of a test: killed ones, and groups that train together over gloo on this machine."""

import gc
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

# Children start from a server that has imported everything once. There is one for all tests, however it is asked for:
# a second list of what it imports would take the place of this one.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["tests.distributed.fsdp_workers", "tests.invariant.trajectories", "hf_lookbehind.scripts.run_seq2seq"]
)

TIMEOUT = 240


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_group(work, *args, world=2, rehearsed=False):
    """`work(*args)` in `world` processes that know each other; returns what each of them returned, by rank.

    Programs rehearse their training there only if asked for, as in the tests' own process.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = start_group(work, *args, world=world, folder=folder, rehearsed=rehearsed)
        for child in children:
            child.join(TIMEOUT)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        assert codes == [0] * world, f"exit codes {codes}"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def start_group(work, *args, world=2, folder=None, rehearsed=False):
    options = world, free_port(), folder, rehearsed
    children = [context.Process(target=_child, args=(work, args, rank, *options)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def leave_out_rehearsals():
    """In this process, for good."""
    for name in ("hf_lookbehind.programs.program", "hf_lookbehind.scripts.run_lifelong"):
        importlib.import_module(name).rehearse = lambda *_: None


def _child(work, args, rank, world, port, folder, rehearsed):
    torch.set_num_threads(1)
    if not rehearsed and "hf_lookbehind.programs.program" in sys.modules:
        leave_out_rehearsals()
    gc.freeze()  # accelerate collects garbage in every training: not in what has been imported
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    result = work(*args)
    if folder is not None:
        torch.save(result, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then end a process that merely returns with an error, after the work is done
