"""What the processes of test_failures.py do. Without pytest, which children would import each time."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.models import weights_of
from tests.training import make_model, make_trainer

CONFIG = dict(k=3, rho=0.05, alpha="adaptive")
PASSES = CONFIG["k"] + 1
STEPS = 6
RUN = dict(max_steps=STEPS, save_strategy="steps", save_steps=2)
SAVED = 4  # the step of the last checkpoint before the failure


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise RuntimeError("the second process fails")


def failing_run(output_dir, failure, a_pass, timeout):
    """The second process fails before the forward of a pass of the step after the last checkpoint."""
    # before the Trainer does, which gives no timeout to a group of CPUs
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    forwards = []

    def before_forward(*_):
        forwards.append(1)
        if dist.get_rank() == 1 and len(forwards) == SAVED * PASSES + a_pass + 1:
            Path(output_dir, "failed_at").write_text(str(time.time()))
            failure()

    model = make_model()
    model.register_forward_pre_hook(before_forward)
    trainer = make_trainer(output_dir, CONFIG, model=model, **RUN)
    try:
        trainer.train()
    finally:
        torch.save(weights_of(model), Path(output_dir, f"left-{dist.get_rank()}.pt"))


class Remember(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = weights_of(model)


def whole_run(output_dir, resume=False):
    """Weights after every step."""
    remember = Remember()
    trainer = make_trainer(output_dir, CONFIG, trainer_kwargs=dict(callbacks=[remember]), **RUN)
    trainer.train(resume_from_checkpoint=resume)
    return remember.weights
