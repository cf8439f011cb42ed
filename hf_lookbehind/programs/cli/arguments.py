"""What the programs are told: data, model, search, training. Bad values are refused before anything is written."""

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...config import InputError
from ...trainer.private import dict_fields
from .paths import check_model_folder, exists, looks_like_path
from .running import bars_are_shown, one_line

# What TrainingArguments raises of values that it does not accept.
_REFUSALS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)

DTYPES = ("float32", "float64", "bfloat16")

# What TrainingArguments accepts and something fails on much later.
_NUMBERS = (
    (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps early_stopping_patience "
        "eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout "
        "save_total_limit",
        "1 or more",
        lambda value: value >= 1,
    ),
    ("num_train_epochs", "more than 0", lambda value: value > 0),
    ("lookahead_steps logging_steps eval_steps save_steps eval_delay", "0 or more", lambda value: value >= 0),
    ("lookahead_alpha", "a number in (0, 1)", lambda value: 0 < value < 1),
    (
        "learning_rate weight_decay adam_epsilon max_grad_norm dataloader_num_workers early_stopping_threshold "
        "warmup_steps neftune_noise_alpha",
        "a finite number, 0 or more",
        lambda value: value >= 0,
    ),
    ("seed data_seed", f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    ("max_steps", "1 or more, or -1 for --num_train_epochs", lambda value: value == -1 or value >= 1),
    ("label_smoothing_factor adam_beta1 adam_beta2", "a number in [0, 1)", lambda value: 0 <= value < 1),
)


# What a trial, of which nothing is written and which nothing ends early, does not look at.
WITHOUT_EFFECT_ON_A_TRIAL = frozenset(
    "output_dir run_name report_to disable_tqdm project do_train do_eval do_predict resume_from_checkpoint use_cpu "
    "seed logging_strategy logging_steps logging_first_step log_level log_level_replica log_on_each_node "
    "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint "
    "eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end metric_for_best_model "
    "greater_is_better early_stopping_patience early_stopping_threshold ignore_data_skip max_steps "
    "num_train_epochs".split()
)


@dataclass
class DataArguments:
    """Where the examples come from and which of them are used."""

    _argument_group_name = "Data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Id of a dataset on the Hub, a local folder of one, or the name of a built-in one."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices as in 'train[:1000]' or 'train[:80%%]'."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to validate on. Default: 'validation' if there is one, else see --train_val_split."},
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Split for a final test (test_accuracy, ...). --do_predict: the split 'test'."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Fraction of the training split to validate on if there is no validation split. 0: none."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate and test on random subsets of this size."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.train_val_split < 1:
            raise InputError(f"--train_val_split {self.train_val_split} is not allowed: a fraction in [0, 1)")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not allowed: 1 or more")

    @property
    def has_test(self) -> bool:
        """Whether test data is asked for by name."""
        return self.test_split is not None

    def check_files(self) -> None:
        """Refuse a path that does not exist; a Hub id is looked up later."""
        name = self.dataset_name
        if name is not None and not exists(name) and looks_like_path(name):
            raise InputError(f"--dataset_name {name!r}: there is no such folder")

    def inputs(self) -> dict[str, str | None]:
        """What is read, by flag: a folder, or an id on the Hub."""
        return {"dataset_name": self.dataset_name}

    def source(self, part: str, split: str) -> str:
        """How messages call the training, validation or test data that a split gives."""
        return split


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Id of a model on the Hub or its local folder. Default: a small new model from a config."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Id or folder of another config than the model's, or of a new model's."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to a new model's config: key=value,key=value."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder that keeps downloads."})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Access token of the Hub. Default: HF_TOKEN or the stored login."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give a model whose head was made for other labels a new head."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights.", "choices": DTYPES})

    def __post_init__(self) -> None:
        if self.config_overrides is not None and self.model_name_or_path is not None:
            raise InputError("--config_overrides is for a new model: it cannot be given with --model_name_or_path")

    def check_files(self) -> None:
        """Refuse a local folder that does not exist or holds no model; a Hub id is looked up later."""
        for name in ("model_name_or_path", "config_name"):
            value = getattr(self, name)
            if value is not None:
                check_model_folder(f"--{name}", value, weights=name == "model_name_or_path")

    def inputs(self) -> dict[str, str | None]:
        """What is read, by flag: a folder, or an id on the Hub."""
        return {name: getattr(self, name) for name in ("model_name_or_path", "config_name")}


@dataclass
class FinetuningArguments(TrainingArguments):
    """The Trainer's arguments, checked further, and those of the evaluation."""

    _argument_group_name = "Training (all of transformers.TrainingArguments)"
    # asked for by `LookbehindMixin`: a callback's arguments stay those that the flags give now, on resume too
    callbacks_go_on = True

    do_train: bool = field(default=True, metadata={"help": "Accepted and not needed: the program always trains."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to continue from: its folder, or 'last': the last complete one of --output_dir"},
    )
    logging_steps: float = field(
        default=0.05, metadata={"help": "Steps between two entries in the logs; below 1, a fraction of all steps."}
    )
    metric: list[str] | None = field(
        default=None,
        metadata={"help": "Metrics of the evaluation: those of the program, or any that `evaluate` can load."},
    )
    lookahead_steps: int = field(
        default=0,
        metadata={
            "help": "Put Lookahead around the optimizer: after so many of its steps (5 is usual) Lookahead's own slow "
            "weights take one, and in the end they are the model. With --k 0, --k 1 or --alpha 1. Default: none."
        },
    )
    lookahead_alpha: float | None = field(
        default=None,
        metadata={"help": "How far a step of Lookahead's slow weights goes to the fast ones. Default: 0.5."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric; needs --load_best_model_at_end."},
    )
    early_stopping_threshold: float | None = field(
        default=None, metadata={"help": "Improvements up to this size do not count. Default: 0."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=False,
        metadata={"help": "Accepted and not needed: a resumed run always goes on with what callbacks have counted."},
    )
    hub_deadline: float | None = field(default=None, metadata={"help": "Seconds after which a push is given up."})

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_reserved()
        self._check_early_stopping()
        if self.lookahead_alpha is not None and not self.lookahead_steps:
            raise InputError("--lookahead_alpha needs --lookahead_steps")
        # else the program's first metric will be the one, which is known later: see `choose_best_metric`
        self.names_best_metric = self.metric_for_best_model is not None
        if self.greater_is_better is None and self.names_best_metric and is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False
        # On a machine with CPUs only, pinned memory has no use, and without this the processes of a launcher do not
        # find each other: each would train, and save, alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            # the library forgets --ddp_timeout on the CPU
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        if self.disable_tqdm is None:
            self.disable_tqdm = not bars_are_shown()
        given = {f.name: getattr(self, f.name) for f in fields(TrainingArguments) if f.init}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of flags that a next major version will not have
                super().__post_init__()
        except _REFUSALS as error:
            raise InputError(f"{_guilty(given)}: {one_line(error)}") from error

    def _check_numbers(self) -> None:
        if not self.do_train:
            raise InputError("--do_train False is not allowed: the program always trains")
        for names, allowed, is_allowed in _NUMBERS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and is_allowed(value)):
                    raise InputError(f"--{name} {value} is not allowed: {allowed}")
        backends = [backend.value.lower() for backend in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise InputError(
                f"--torch_compile_backend {self.torch_compile_backend!r} is not allowed: one of {', '.join(backends)}"
            )
        for name in dict_fields(self):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise InputError(f"--{name} {value!r} is not JSON: {error}") from error

    def _check_reserved(self) -> None:
        for f in fields(TrainingArguments):
            if is_reserved(f.name) and getattr(self, f.name) != f.default:
                raise InputError(f"--{f.name} is not supported: the program pushes, once, and not its Trainer")

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold is not None:
                raise InputError("--early_stopping_threshold needs --early_stopping_patience")
            return
        if not self.load_best_model_at_end:
            raise InputError("--early_stopping_patience needs --load_best_model_at_end")
        if self.eval_strategy == "no":
            raise InputError("--early_stopping_patience needs --eval_strategy epoch or steps")

    @property
    def seed_of_data(self) -> int:
        """Of the choice of examples."""
        return self.seed if self.data_seed is None else self.data_seed

    def of_a_trial(self, output_dir: str) -> "FinetuningArguments":
        """The same for a training that is only tried: it saves and reports nothing, and nothing ends it early."""
        trial = copy.copy(self)
        trial.output_dir = output_dir
        trial.save_strategy, trial.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        trial.load_best_model_at_end, trial.early_stopping_patience = False, None
        trial.save_total_limit, trial.enable_jit_checkpoint, trial.eval_on_start = None, False, False
        trial.report_to, trial.disable_tqdm, trial.logging_strategy = [], True, IntervalStrategy.NO
        return trial

    def choose_best_metric(self, keys: Sequence[str]) -> None:
        """Rate checkpoints by the first metric, unless the flags name another, which must be one that is reported.

        Args:
            keys: of all metrics, without `eval_`.

        Raises:
            InputError: `--metric_for_best_model` is not reported by any evaluation.
        """
        keeps_best = self.load_best_model_at_end or self.save_strategy == "best"
        if keeps_best and keys and not self.names_best_metric:
            self.metric_for_best_model, self.greater_is_better = keys[0], not is_lower_better(keys[0])
        allowed = ["loss", *keys]
        name = self.metric_for_best_model
        if name is not None and name.removeprefix("eval_") not in allowed:
            raise InputError(f"--metric_for_best_model {name!r} is not reported: allowed are {', '.join(allowed)}")


@dataclass
class SearchArguments:
    """A search before the training, for a radius that suits the task."""

    _argument_group_name = "Search of rho"

    rho_search: list[str] | None = field(
        default=None,
        metadata={
            "help": "Radii to try before the training, or 'grid' for the usual ones: a training each, rated on the "
            "validation split by the first metric. The final training takes the best."
        },
    )
    learning_rate_search: list[float] | None = field(
        default=None, metadata={"help": "Learning rates to try with each of the radii. Default: --learning_rate."}
    )
    search_seeds: int = field(default=1, metadata={"help": "Trainings per setting, under seeds of their own."})
    search_max_steps: int | None = field(
        default=None, metadata={"help": "Steps of each training of the search. Default: those of the final one."}
    )

    def __post_init__(self) -> None:
        if self.rho_search is None:
            if self.learning_rate_search is not None:
                raise InputError("--learning_rate_search needs --rho_search")
            return
        for name in ("search_seeds", "search_max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is not allowed: 1 or more")
        if len(self.learning_rate_search or ()) > 7:
            raise InputError(f"--learning_rate_search has {len(self.learning_rate_search or ())} values: 7 at most")
        for rate in self.learning_rate_search or ():
            if not (math.isfinite(rate) and rate >= 0):
                raise InputError(f"--learning_rate_search {rate} is not allowed: finite numbers, 0 or more")


def _guilty(given: dict[str, Any]) -> str:
    """The first of the Trainer's arguments that is not the default, and without which they are accepted."""
    for f in fields(TrainingArguments):
        if f.init and given[f.name] != f.default and f.default is not MISSING:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    TrainingArguments(**given | {f.name: f.default})
            except _REFUSALS:
                continue
            return f"--{f.name} {getattr(given[f.name], 'value', given[f.name])} cannot be used"
    return "training arguments"


def is_reserved(name: str) -> bool:
    """Whether a flag of the Trainer stands for what the programs do in its place, see `sharing.py`, or not at all."""
    return name == "push_to_hub" or name.startswith("hub_")


def is_lower_better(metric: str | None) -> bool:
    """Whether a metric measures what is bad, as far as its name tells."""
    name = re.sub("^(eval|test)_", "", metric or "").lower()
    return name.endswith("loss") or name in ("perplexity", "mse", "mae", "rmse", "wer", "cer", "ter", "forgetting")
