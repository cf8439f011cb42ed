"""What the training on one task is told of the tasks before it: nothing, a memory of them, or all."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainerCallback

from ..config import InputError, LookbehindConfig
from ..tensors.processes import is_sharded
from ..tensors.replay import SameFunction
from ..trainer.private import collator_of_used_columns, prepare_inputs
from .memory import ReplayMemory
from .tasks import TaskSequence, labels_of


class NoReplay:
    """Naive fine-tuning, one task after another: the lower line of a comparison.

    Attributes:
        memory: of earlier tasks, or None.
    """

    name = "none"
    memory: ReplayMemory | None = None

    def check(self, tasks: TaskSequence) -> None:
        """Raises `InputError` where the memory has less than one place for each class of the stream."""
        if self.memory is None:
            return
        classes = {label for task in tasks for label in task.classes} or set(labels_of(tasks[0].train).tolist())
        num_classes = len(classes)
        if self.memory.size < num_classes:
            raise InputError(
                f"memory_size={self.memory.size} is not allowed: one example or more for each of the {num_classes} "
                "classes"
            )

    def settings(self, tasks: TaskSequence, current: int) -> dict[str, Any]:
        """Arguments of the Trainer of task `current` (from 0)."""
        return {"train_dataset": tasks[current].train}

    def attach(self, trainer: Any) -> None:
        """Told the Trainer, before it trains."""

    def gradient_passes(self, config: LookbehindConfig, steps: int) -> float:
        """The cost of a task that is over: gradients, in units of one window of the task's own examples."""
        return config.gradient_passes(steps)

    def describe(self) -> dict[str, Any]:
        """What tells this replay from another, as plain data."""
        memory = self.memory
        about = {} if memory is None else {"policy": memory.policy, "memory_size": memory.size, "seed": memory.seed}
        return {"replay": self.name} | about


class JointTraining(NoReplay):
    """The data of all tasks so far, in each task: the upper line of a comparison, which forgets nothing."""

    name = "joint"

    def settings(self, tasks: TaskSequence, current: int) -> dict[str, Any]:
        return {"train_dataset": ConcatDataset([task.train for task in tasks[: current + 1]])}


class _WithMemory(NoReplay):
    """What replays a memory, which takes in each task when its training is over.

    Args:
        memory: empty at first; the runner fills it.
        ratio: examples of the memory for each example of the task, above 0.
    """

    def __init__(self, memory: ReplayMemory, ratio: float = 1.0) -> None:
        if not (math.isfinite(ratio) and ratio > 0):
            raise InputError(f"replay_ratio={ratio} is not allowed: a finite number above 0")
        self.memory, self.ratio = memory, ratio

    @property
    def filled(self) -> ReplayMemory | None:
        """The memory, once a task has been put into it."""
        return self.memory if self.memory else None

    def gradient_passes(self, config: LookbehindConfig, steps: int) -> float:
        own = config.gradient_passes(steps)
        return own + self.ratio * self.passes_over_memory(own, steps) if self.filled else own

    def passes_over_memory(self, own: float, steps: int) -> float:
        """How many of the gradients take examples of the memory; `own` take those of the task."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"replay_ratio": self.ratio}


class ExperienceReplay(_WithMemory):
    """Every batch of a task is followed by examples of the memory (Chaudhry et al., 2019, arXiv 1902.10486).

    They are part of the window: all passes of an iteration, ascents too, see them.
    """

    name = "replay"

    def settings(self, tasks: TaskSequence, current: int) -> dict[str, Any]:
        if self.filled is None:
            return super().settings(tasks, current)
        mixed = MixedDataset(tasks[current].train, self.filled, self.ratio)
        return {"train_dataset": mixed, "callbacks": [_EpochCallback(mixed)]}

    def passes_over_memory(self, own: float, steps: int) -> float:
        return own


class AGEM(_WithMemory):
    """Averaged gradient episodic memory: no descent may raise the loss on the memory, to first order.

    g_ref is the gradient on a batch of the memory at the slow weights: one more gradient per window. Each descent of
    the window takes g - (g.g_ref / g_ref.g_ref) g_ref where g.g_ref < 0, and g elsewhere (Chaudhry et al., 2019,
    arXiv 1812.00420, equation 11). The ascents climb the gradients of the task, as they are.
    """

    name = "agem"

    def settings(self, tasks: TaskSequence, current: int) -> dict[str, Any]:
        settings = super().settings(tasks, current)
        return settings if self.filled is None else settings | {"transform_gradient": self.project}

    def attach(self, trainer: Any) -> None:
        self._trainer, self._step, self._reference = trainer, -1, []

    def passes_over_memory(self, own: float, steps: int) -> float:
        return steps

    @torch.no_grad()
    def project(self, pass_index: int) -> None:
        """A `transform_gradient`: project `.grad` where it opposes the memory's gradient."""
        trainer = self._trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        # the first descent of a window starts from the slow weights, whichever pass it follows
        if self._step != trainer.state.global_step:
            self._reference = self._gradient_on_memory(parameters)
            self._step = trainer.state.global_step
        used = [(p, r) for p, r in zip(parameters, self._reference, strict=True) if r is not None]
        projected = project([torch.zeros_like(p) if p.grad is None else p.grad for p, _ in used], [r for _, r in used])
        for (parameter, _), gradient in zip(used, projected, strict=True):
            if parameter.grad is not None or gradient.count_nonzero():
                parameter.grad = gradient

    def _gradient_on_memory(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """g_ref, scaled as `.grad` is; the training's gradients, random numbers and buffers stay as they are."""
        trainer = self._trainer
        args = trainer.args
        count = math.ceil(self.ratio * args.per_device_train_batch_size * args.gradient_accumulation_steps)
        assert self.memory is not None
        examples = self.memory.draw(count, trainer.state.global_step, args.process_index)

        def closure() -> None:
            inputs = prepare_inputs(trainer, collator_of_used_columns(trainer)(examples))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model_wrapped, inputs)
            trainer.accelerator.backward(loss)

        own = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            devices = {p.device for p in parameters}
            with SameFunction(trainer.model, devices, passes=2, others=[trainer]) as same_function:
                with trainer._logging_off():
                    same_function.rehearse(closure)
            return [p.grad for p in parameters]
        finally:
            for p, gradient in zip(parameters, own, strict=True):
                p.grad = gradient


def project(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients without their part against the reference; themselves where they do not oppose it.

    Args:
        gradients, reference: tensors of the same shapes, each list one long vector.

    Raises:
        InputError: tensors that are sharded over processes.
    """
    if any(map(is_sharded, gradients)):
        raise InputError("replay 'agem' is not supported with sharded parameters: use another replay, or no sharding")
    product = _dot(gradients, reference)
    if not product < 0:
        return gradients
    scale = product / _dot(reference, reference)
    return [g - scale.to(g) * r for g, r in zip(gradients, reference, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Of two lists of tensors as one long vector, in float32 or better."""
    dtype = torch.promote_types(a[0].dtype, torch.float32)
    return torch.stack([torch.sum(x.to(dtype) * y.to(dtype)).to(a[0].device) for x, y in zip(a, b, strict=True)]).sum()


class MixedDataset(Dataset):
    """A task's dataset, whose every batch is followed by examples of the memory.

    Which ones follows from the epoch and from what is in the batch: no worker or resumed run needs to know how many
    batches came before.

    Args:
        own: dataset of the task.
        memory: not empty.
        ratio: examples of the memory for each of the task, in each batch rounded up.
    """

    def __init__(self, own: Any, memory: ReplayMemory, ratio: float) -> None:
        self.own, self.memory, self.ratio = own, memory, ratio
        # shared with the workers of a data loader, which may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """An example of the task."""
        return self.own[position]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """A batch: what the positions name, and then examples of the memory."""
        fetch = getattr(self.own, "__getitems__", None)
        own = [self.own[i] for i in positions] if fetch is None else fetch(positions)
        count = math.ceil(self.ratio * len(positions))
        return [*own, *self.memory.draw(count, int(self.epoch), *map(int, positions))]


class _EpochCallback(TrainerCallback):
    """Tells a dataset which epoch begins; after a resume that is the one that had begun before."""

    def __init__(self, dataset: MixedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch.fill_(int(state.epoch or 0))


METHODS = ("none", "reservoir", "balanced", "agem", "joint")


def make_replay(method: str, *, memory_size: int = 200, ratio: float = 1.0, seed: int = 0) -> NoReplay:
    """A replay by name.

    Args:
        method: "none" and "joint": no memory. "reservoir" and "balanced": `ExperienceReplay` with such a memory.
            "agem": `AGEM` with a balanced one.
        memory_size: examples in the memory.
        ratio: examples of the memory for each example of the task.
        seed: of the memory.

    Raises:
        InputError: an unknown method, or a value that is not allowed.
    """
    if method not in METHODS:
        raise InputError(f"replay={method!r} is not allowed: one of {', '.join(METHODS)}")
    if method in ("none", "joint"):
        return NoReplay() if method == "none" else JointTraining()
    if method == "agem":
        return AGEM(ReplayMemory(memory_size, "balanced", seed), ratio)
    return ExperienceReplay(ReplayMemory(memory_size, method, seed), ratio)
