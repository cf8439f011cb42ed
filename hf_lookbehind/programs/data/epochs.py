"""Data that is drawn anew in each epoch, as (seed, epoch, example) say: a resumed run draws what the whole one did."""

from typing import Protocol

from transformers import TrainerCallback


class OfEpochs(Protocol):
    """A dataset whose examples depend on the epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class EpochCallback(TrainerCallback):
    """Tells a dataset which epoch begins; after a resume that is the one that had begun before."""

    def __init__(self, dataset: OfEpochs) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
