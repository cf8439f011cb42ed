"""DDP and FSDP2 over the devices of this machine: one trajectory with one process on the same global batch."""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_lookbehind import Lookbehind, LookbehindConfig

Row = dict[str, Any]
ENGINES = ("DDP", "FSDP2")
CONFIGS: dict[str, dict[str, Any]] = {"SAM": {"k": 1}, "Lookbehind-SAM, adaptive": {"k": 3, "alpha": "adaptive"}}
BOUND = 1e-4  # float32, sums in another order
TIMEOUT = 120


def engine_rows(device: str, world: int | None = None) -> list[Row]:
    """A record for each engine and method; none on a machine with one device.

    Args:
        device: their type.
        world: the number of processes. Default: that of the devices, two at most.
    """
    if world is None:
        world = min(2, torch.cuda.device_count()) if torch.device(device).type == "cuda" else 1
    if world < 2:
        return []
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    expected = {name: _trained(torch.device(device), None, 0, 1, settings) for name, settings in CONFIGS.items()}
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_child, args=(rank, world, device, folder)) for rank in range(world)]
        for child in children:
            child.start()
        for child in children:
            child.join(TIMEOUT)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        if codes != [0] * world:
            error = f"the processes ended with exit codes {codes}; None: too slow"
            return [{"check": f"{world} processes", "bound": BOUND, "value": None, "passed": False, "error": error}]
        found = torch.load(Path(folder, "weights.pt"), weights_only=True)
    rows: list[Row] = []
    for engine in ENGINES:
        for name in CONFIGS:
            value = max((a - b).abs().max().item() for a, b in zip(found[engine][name], expected[name], strict=True))
            check = f"{engine}, {world} processes and one, {name}"
            rows.append({"check": check, "bound": BOUND, "value": value, "passed": value <= BOUND})
    rows[0]["seconds"] = round(time.perf_counter() - start, 2)
    return rows


def _child(rank: int, world: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    place = torch.device(device, rank) if device != "cpu" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    # a file, not a port: none can be taken by another program
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = {e: {name: _trained(place, e, rank, world, s) for name, s in CONFIGS.items()} for e in ENGINES}
    if rank == 0:
        torch.save(found, Path(folder, "weights.pt"))
    dist.barrier()
    os._exit(0)  # threads of a backend can end a process that merely returns with an error


def _trained(place: torch.device, engine: str | None, rank: int, world: int, settings: dict[str, Any]) -> list[Tensor]:
    """The weights after four iterations, of which each process sees its share of the batch."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(place)
    inputs, labels = torch.randn(8, 16).to(place), (torch.arange(8) % 4).to(place)
    inputs, labels = inputs.chunk(world)[rank], labels.chunk(world)[rank]
    if engine == "DDP":
        model = DistributedDataParallel(model, device_ids=[place.index] if place.type == "cuda" else None)
    elif engine == "FSDP2":
        fully_shard(model, mesh=init_device_mesh(place.type, (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(rho=0.05, **settings))

    def closure() -> Tensor:
        lookbehind.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss.detach()

    for _ in range(4):
        lookbehind.step(closure)
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for p in model.parameters()]
