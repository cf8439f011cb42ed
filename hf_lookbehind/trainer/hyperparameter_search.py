"""`Trainer.hyperparameter_search` over the settings of Lookbehind, beside those of `TrainingArguments`."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config import LookbehindConfig
from .base import MixinBase

_FIELDS = {field.name for field in dataclasses.fields(LookbehindConfig)}


class SearchMixin(MixinBase):
    """A trial's settings."""

    def _hp_search_setup(self, trial: Any) -> None:
        with choose_trial_settings(self, trial) as rest:
            super()._hp_search_setup(rest)


@contextmanager
def choose_trial_settings(trainer: Any, trial: Any) -> Iterator[Any]:
    """Give a trial's `k`, `rho`, `alpha` ... to `trainer.lookbehind_config`, and the rest to the Trainer.

    Args:
        trainer: one with `lookbehind_config`.
        trial: what the Trainer's `_hp_search_setup` gets: None, an Optuna trial, or a mapping of chosen values (Ray
            Tune, Weights & Biases).

    Yields:
        The trial for the Trainer's own setup; inside the context, an Optuna space gives only the Trainer's values.

    Raises:
        InputError: a value that `LookbehindConfig` does not allow.
    """
    is_search = trial is not None and trainer.hp_search_backend is not None
    if not is_search:
        yield trial
        return
    space = trainer.hp_space
    values = trial if isinstance(trial, Mapping) else space(trial)
    ours = {name: value for name, value in values.items() if name in _FIELDS}
    rest = {name: value for name, value in values.items() if name not in _FIELDS}
    trainer.lookbehind_config = dataclasses.replace(trainer.lookbehind_config, **ours)
    trainer.hp_space = lambda _: rest
    try:
        yield rest if isinstance(trial, Mapping) else trial
    finally:
        trainer.hp_space = space
