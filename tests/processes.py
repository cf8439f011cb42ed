"""Children of a test: killed ones, and groups that train together over gloo on this machine."""

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

# Children start from a server that has imported everything once.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.training", "hf_lookbehind.programs.program"])

TIMEOUT = 240


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_group(work, *args, world=2):
    """`work(*args)` in `world` processes that know each other; returns what each of them returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        children = start_group(work, *args, world=world, folder=folder)
        for child in children:
            child.join(TIMEOUT)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        assert codes == [0] * world, f"exit codes {codes}"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def start_group(work, *args, world=2, folder=None):
    port = free_port()
    children = [context.Process(target=_child, args=(work, args, rank, world, port, folder)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def _child(work, args, rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    result = work(*args)
    if folder is not None:
        torch.save(result, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then end a process that merely returns with an error, after the work is done
