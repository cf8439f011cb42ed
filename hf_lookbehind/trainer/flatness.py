"""`FlatnessCallback`: sharpness and robustness to noisy weights, measured while a Trainer trains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..config import InputError
from ..measures import NotFiniteError, sharpness, weight_noise
from ..measures.accepted import check_numbers, check_whole
from ..measures.sharpness import checked_radii
from .private import prepare_inputs, without_unused_columns

logger = logging.get_logger(__name__)


# What the Trainer reports of an evaluation beside its metrics.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def measured_batches(trainer: Trainer, dataset: Any = None, max_examples: int | None = None) -> list[Any]:
    """The batches of a dataset that the measures of this process read.

    In several processes each has every n-th batch. Unlike those of the Trainer's own data loader, which fills up the
    last ones, all of them together hold each example once: N processes measure what one does.

    Args:
        trainer: gives the collator and the size of a batch.
        dataset: indexable. Default: the evaluation dataset.
        max_examples: the first so many. Default: all.

    Raises:
        InputError: there is no dataset, there are several, or it cannot be indexed.
    """
    dataset = _dataset_of(trainer, dataset)
    if isinstance(dataset, datasets.Dataset):
        dataset = without_unused_columns(trainer, dataset, of="evaluation")
    number = len(dataset) if max_examples is None else min(len(dataset), max_examples)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size = trainer.args.eval_batch_size
    starts = range(rank * size, number, world * size)
    return [trainer.data_collator([dataset[i] for i in range(s, min(s + size, number))]) for s in starts]


def _dataset_of(trainer: Trainer, dataset: Any) -> Any:
    """The dataset to measure on, which is by default that of the evaluations."""
    dataset = trainer.eval_dataset if dataset is None else dataset
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset))
        raise InputError(f"there are several evaluation datasets ({names}): dataset=... says which one is measured on")
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"dataset={dataset!r} is not allowed: an indexable eval_dataset is needed to measure on")
    return dataset


def rated_by(trainer: Trainer, dataset: Any, metric: str) -> Any:
    """A function of a model that gives its metric on a dataset, as `Trainer.predict` computes it.

    It raises `InputError` where the Trainer computes no such metric.
    """
    return lambda model: metric_of(metrics_on(trainer, dataset), metric)


def metrics_on(trainer: Trainer, dataset: Any) -> dict[str, float]:
    """What `Trainer.predict` computes on a dataset, without a prefix."""
    found = trainer.predict(dataset, metric_key_prefix="flat").metrics or {}
    return {name.removeprefix("flat_"): value for name, value in found.items()}


def metric_of(metrics: Mapping[str, float], name: str) -> float:
    """One of the metrics.

    Raises:
        InputError: it is none of them.
    """
    if name not in metrics:
        found = ", ".join(n for n in metrics if n not in _NO_METRICS) or "none"
        raise InputError(f"the evaluation gives no metric {name!r}, but {found}")
    return metrics[name]


class FlatnessCallback(TrainerCallback):
    """Measures the slow weights on the validation set every n epochs, and logs what it finds.

    Logged are `flatness_sharpness_<rho>`, the rise of the loss within the radius rho, and `flatness_noise_<sigma>`,
    the mean of a metric under weight noise; nan for what cannot be measured, of which a warning says why. The training
    goes on as it would have without: weights, buffers, gradients, modes and random states are put back bit for bit.

    Args:
        trainer: that the callback is added to: `trainer.add_callback(FlatnessCallback(trainer, rhos=[0.05]))`.
        rhos: radii of `hf_lookbehind.measures.sharpness`.
        sigmas: noise levels of `hf_lookbehind.measures.weight_noise`.
        every: epochs between two measurements; an epoch that is cut short does not count.
        metric: that of the evaluation that noise is rated by, without `eval_`.
        dataset: to measure on. Default: the Trainer's eval_dataset.
        max_examples: of it, to measure the sharpness on.
        draws: of the noise, per level.
        sharpness_settings: further arguments of `sharpness`, such as `kind` and `steps`.

    Raises:
        InputError: there is no validation set, or there are several; there is nothing to measure; nothing computes the
            metric; an argument is not what the measures take; or the training data has no length, so that its epochs
            cannot be counted.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        rhos: Sequence[float] = (),
        sigmas: Sequence[float] = (),
        every: int = 1,
        metric: str = "loss",
        dataset: Any = None,
        max_examples: int | None = 512,
        draws: int = 5,
        **sharpness_settings: Any,
    ) -> None:
        if not rhos and not sigmas:
            raise InputError("rhos=() and sigmas=() leave nothing to measure: give one of them")
        if every < 1:
            raise InputError(f"every={every} is not allowed: 1 or more epochs")
        if rhos:
            checked_radii(rhos, **sharpness_settings)
        if sigmas:
            check_numbers("sigmas", sigmas, of="noise levels", least=0)
        check_whole("draws", draws, least=1)
        if max_examples is not None:
            check_whole("max_examples", max_examples, least=1)
        _dataset_of(trainer, dataset)
        if sigmas and metric != "loss" and trainer.compute_metrics is None:
            raise InputError(f"metric={metric!r} is not allowed: the Trainer has no compute_metrics, and 'loss' alone")
        if not hasattr(trainer.train_dataset, "__len__"):
            raise InputError("FlatnessCallback counts epochs: it needs a train_dataset with a length")
        self.trainer, self.rhos, self.sigmas, self.every = trainer, rhos, sigmas, every
        self.metric, self.dataset, self.max_examples, self.draws = metric, dataset, max_examples, draws
        self.sharpness_settings = sharpness_settings

    def on_epoch_end(self, args, state, control, **kwargs):
        # the Trainer calls this also where max_steps, or a callback, has ended an epoch before its last step
        if state.epoch % self.every == 0:
            self.trainer.log(self.measure())

    def measure(self) -> dict[str, float]:
        """What is logged, for the weights that the model has now; all processes call it."""
        trainer, found = self.trainer, {}
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        dataset = _dataset_of(trainer, self.dataset)
        if self.rhos:
            batches = [prepare_inputs(trainer, b) for b in measured_batches(trainer, dataset, self.max_examples)]
            try:
                measured = sharpness(model, batches, self.rhos, loss_fn=_loss_of(trainer), **self.sharpness_settings)
            except NotFiniteError as error:  # of the model as it is: the training decides what becomes of that
                logger.warning(f"the sharpness cannot be measured, and is logged as nan: {error}")
                measured = dict.fromkeys(map(float, self.rhos), math.nan)
            found |= {f"flatness_sharpness_{rho:g}": rise for rho, rise in measured.items()}
        if self.sigmas:
            evaluate = rated_by(trainer, dataset, self.metric)
            records = weight_noise(model, evaluate, self.sigmas, draws=self.draws)
            found |= {f"flatness_noise_{record['sigma']:g}": record["mean"] for record in records}
        return found


def _loss_of(trainer: Trainer) -> Any:
    """The loss that the Trainer trains with, as the measures want it."""

    def loss(model: Any, batch: Any) -> Any:
        return trainer.compute_loss(model, dict(batch))  # a copy, because compute_loss may pop labels

    return loss
