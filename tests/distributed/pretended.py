"""FSDP by accelerate's own settings, on CPUs: one entry of its state says that there are GPUs, nothing is patched.

As a module, `accelerate launch ... -m tests.distributed.pretended MODULE FLAGS`, it runs a program so.
"""

import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

# For TrainingArguments made after `pretend_gpus`.
ON_PRETENDED = dict(use_cpu=True, accelerator_config={"use_configured_state": True})


def pretend_gpus():
    """Before each TrainingArguments; in a process of a group of its own."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pinned memory wants a GPU


class AssertSharded(TrainerCallback):
    """All weights are shards, and accelerate holds them."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        assert AcceleratorState().is_fsdp2
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.shape[0] > 1)


def whole_weights(model):
    """By the names of the unwrapped model."""
    wrapper = "_checkpoint_wrapped_module."
    return {
        n.replace(wrapper, ""): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_gpus()
    _, module, *flags = sys.argv
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
