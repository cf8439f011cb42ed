"""What the processes of the test of trainers that generate do."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import zero
from tests.distributed.pretended import ON_PRETENDED, pretend_gpus, whole_weights
from tests.generating import CASES as GENERATING
from tests.generating import logs_of, train
from tests.models import max_difference, weights_of

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)
CASES = {
    "grpo": ("grpo", {}),
    "mu 2": ("grpo", dict(num_iterations=2)),
    "a generation between two losses": ("grpo", dict(steps_per_generation=1)),
    "beta": ("grpo", dict(beta=0.1)),
    "lora": ("grpo", dict(peft=True)),
    "adaptive entropy": ("grpo", dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=3.0)),
    "rloo": ("rloo", {}),
    "a2po": ("a2po", {}),
    "m-sharpness": ("grpo", {}),
}


def compare(name, output_dir, engine="DDP"):
    """Of a case: the difference of neutral weights, whether the logs are equal, the counts, and the sharpness.

    `engine`: DDP, FSDP2, or a stage of ZeRO.
    """
    case, settings = CASES[name]
    folder = Path(output_dir, os.environ["RANK"])
    GENERATING[case](folder, use_cpu=True)  # writes the model, which one process alone would do in a group
    climbing = dict(k=3, rho=0.05, sync_ascent=name != "m-sharpness")
    plain, neutral, ours = (_trained(case, folder, c, engine, settings) for c in (None, NO_PERTURBATION, climbing))
    weights = torch.cat([p.flatten() for p in ours.weights.values()])
    of_all = [torch.zeros_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, weights)
    return dict(
        difference=max_difference(plain.weights, neutral.weights),
        logs=logs_of(plain) == logs_of(neutral),
        calls=(plain.calls, neutral.calls, ours.calls),
        alike=all(torch.equal(weights, other) for other in of_all),
        sharpness=[log["sharpness"] for log in ours.state.log_history[:-1]],
        wrapped=type(ours.model_wrapped).__name__,
    )


def _trained(case, folder, config, engine, settings):
    """A trainer that has trained, with its whole `weights`."""
    if engine == "DDP":
        options, whole = dict(ddp_backend="gloo"), weights_of
    elif engine == "FSDP2":
        pretend_gpus()
        fsdp = dict(fsdp=True, fsdp_config=dict(transformer_layer_cls_to_wrap="LlamaDecoderLayer"))
        options, whole = fsdp | ON_PRETENDED, whole_weights
    else:
        zero.use_deepspeed()
        options, whole = dict(deepspeed=zero.settings(engine)) | zero.ON_CPU, zero.masters
    trainer = train(case, folder, config, **options, **settings)
    trainer.weights = whole(trainer.model)
    return trainer
