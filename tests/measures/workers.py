"""What the processes of the tests do: every measure, on a share of the batches."""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import (
    compression,
    hessian_eigenvalues,
    hessian_trace,
    loss_line,
    loss_plane,
    sharpness,
    weight_noise,
)
from tests.measures.problems import assert_same_traces, image_batches, traces, vit
from tests.models import layers_of

SIZES = (3, 2, 1, 2)


def other():
    model = vit()
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.01 * i)
    return model.state_dict()


REPLICATED = {
    "one_step": lambda m, b: sharpness(m, b, [0.3], kind="one_step"),
    "adaptive one_step": lambda m, b: sharpness(m, b, [0.3], kind="one_step", adaptive=True),
    "eigenvalues": lambda m, b: hessian_eigenvalues(m, b, 2),
    "trace": lambda m, b: hessian_trace(m, b, draws=2)["values"],
}
ANY = {
    "worst": lambda m, b: sharpness(m, b, [0.3], steps=4),
    "adaptive": lambda m, b: sharpness(m, b, [0.3], steps=4, adaptive=True),
    "average": lambda m, b: sharpness(m, b, [0.3], kind="average", steps=2, adaptive=True),
    "line": lambda m, b: loss_line(m, b, [0.5, 1]).losses,
    "line to another": lambda m, b: loss_line(m, b, [0.5, 1], to=other()).losses,
    "plane": lambda m, b: sum(loss_plane(m, b, [0.5], [1.0, 0.0]).losses, []),
    **{
        f"{kind} noise": lambda m, b, kind=kind: weight_noise(m, _loss_of_all, [0.3, 0.0], kind=kind, draws=2)[0][
            "values"
        ]
        for kind in ("multiplicative", "additive")
    },
    "compression": lambda m, b: [
        record[name]
        for record in compression(m, _loss_of_all, ["int3", "int3:tensor", "nf4", "fp8", "prune:0.7"])
        for name in ("value", "change")
    ],
}


def _loss_of_all(model):
    """Of the whole data, in each process."""
    return model(**image_batches((8,))[0]).loss.item()


def one_process(measures):
    return {name: measure(vit(), image_batches(SIZES)) for name, measure in measures.items()}


def replicated():
    """Under DDP, whose reducer then still works."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(vit())
    mine = image_batches(SIZES)[dist.get_rank() :: 2]
    before = traces(model)
    results = {name: measure(model, mine) for name, measure in (REPLICATED | ANY).items()}
    assert_same_traces(traces(model), before)
    model(**mine[0]).loss.backward()
    return results, model.module.classifier.weight.grad


def unequal_shares():
    """One process has three batches, the other one."""
    dist.init_process_group("gloo")
    batches = image_batches(SIZES)
    mine = batches[:3] if dist.get_rank() == 0 else batches[3:]
    measures = REPLICATED | {"worst": ANY["worst"], "line": ANY["line"]}
    return {name: measure(vit(), mine) for name, measure in measures.items()}


def sharded():
    """Under FSDP2; what it says where it cannot."""
    dist.init_process_group("gloo")
    model = vit()
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    batches, rank = image_batches(SIZES), dist.get_rank()
    model(**batches[0]).loss.backward()
    held = [(p, p.to_local().clone(), p.grad, p.grad.to_local().clone()) for p in model.parameters()]
    results = {}
    for name, measure in ANY.items():
        _loss_of_all(model)  # a forward without a backward, after which FSDP2's modules hold whole parameters
        results[name] = measure(model, batches[rank::2])
    loss, calls = _loss_of_all(model), []

    def failing(net, batch):
        calls.append(1)
        if len(calls) == 4:  # in the forward of a moved model
            raise KeyError("boom")
        return net(**batch).loss

    try:
        sharpness(model, batches[rank::2], [0.3], loss_fn=failing)
    except KeyError:
        results["after an error"] = _loss_of_all(model) - loss
    for p, local, gradient, local_gradient in held:
        assert p.to_local().equal(local) and p.grad is gradient and gradient.to_local().equal(local_gradient)
    said = {}
    uneven = batches[:3] if rank == 0 else batches[3:]
    refused = {name: (measure, batches[rank::2]) for name, measure in REPLICATED.items()}
    for name, (measure, mine) in (refused | {"uneven": (ANY["worst"], uneven)}).items():
        try:
            measure(model, mine)
        except InputError as error:
            said[name] = str(error)
    model.bfloat16()
    try:
        ANY["worst"](model, batches[rank::2])
    except InputError as error:
        said["bfloat16"] = str(error)
    return results, said
