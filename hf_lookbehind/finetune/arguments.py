"""Flags of the programs: data, model, Lookbehind, training. Bad ones are refused before anything is written."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import torch.distributed as dist
import yaml
from accelerate.utils import DynamoBackend
from transformers import HfArgumentParser, TrainingArguments

from ..config import InputError, LookbehindConfig
from .paths import check_model_folder, check_output_dir, exists, looks_like_path, resume_from
from .program import one_line

DTYPES = ("float32", "float64", "bfloat16")

# What TrainingArguments accepts and something fails on much later.
_NUMBERS = (
    (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps early_stopping_patience",
        "1 or more",
        lambda value: value >= 1,
    ),
    ("num_train_epochs", "more than 0", lambda value: value > 0),
    (
        "learning_rate weight_decay adam_epsilon max_grad_norm dataloader_num_workers early_stopping_threshold",
        "a finite number, 0 or more",
        lambda value: value >= 0,
    ),
    ("seed data_seed", f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    ("max_steps", "1 or more, or -1 for --num_train_epochs", lambda value: value == -1 or value >= 1),
    ("label_smoothing_factor adam_beta1 adam_beta2", "a number in [0, 1)", lambda value: 0 <= value < 1),
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

    def check_files(self) -> None:
        """Refuse a path that does not exist; a Hub id is looked up later."""
        name = self.dataset_name
        if name is not None and not exists(name) and looks_like_path(name):
            raise InputError(f"--dataset_name {name!r}: there is no such folder")

    def inputs(self) -> dict[str, str | None]:
        """What is read, by flag: a folder, or an id on the Hub."""
        return {"dataset_name": self.dataset_name}


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

    do_train: bool = field(default=True, metadata={"help": "Accepted and not needed: the program always trains."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to continue from: its folder, or 'last': the last complete one of --output_dir"},
    )
    metric: str = field(
        default="accuracy", metadata={"help": "Metric of the evaluation; others than accuracy come from `evaluate`."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric; needs --load_best_model_at_end."},
    )
    early_stopping_threshold: float | None = field(
        default=None, metadata={"help": "Improvements up to this size do not count. Default: 0."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_reserved()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = self.metric
        self._check_early_stopping()
        # On a machine with CPUs only, pinned memory has no use, and without this the processes of a launcher do not
        # find each other: each would train, and save, alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            # the library forgets --ddp_timeout on the CPU
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        try:
            super().__post_init__()
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise InputError(f"training arguments: {one_line(error)}") from error

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
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise InputError(f"--{name} {value!r} is not JSON: {error}") from error

    def _check_reserved(self) -> None:
        for f in fields(TrainingArguments):
            if _is_reserved(f.name) and getattr(self, f.name) != f.default:
                raise InputError(f"--{f.name} is reserved: pushing to the Hub is not built yet")

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold is not None:
                raise InputError("--early_stopping_threshold needs --early_stopping_patience")
            return
        if not self.load_best_model_at_end:
            raise InputError("--early_stopping_patience needs --load_best_model_at_end")
        if self.eval_strategy == "no":
            raise InputError("--early_stopping_patience needs --eval_strategy epoch or steps")


def _is_reserved(name: str) -> bool:
    return name == "push_to_hub" or name.startswith("hub_")


def _flag_type(hint: Any) -> Any:
    """The type of a `LookbehindConfig` field as a flag: numbers come as text, for the config itself to judge."""
    if hint is bool:
        return bool
    if any(getattr(kind, "__origin__", None) is Sequence for kind in get_args(hint)):
        return list[str] | None
    return str | None


def _lookbehind_flags() -> type:
    """A dataclass with a flag for every field of `LookbehindConfig`: name, default and help are the config's."""
    hints = get_type_hints(LookbehindConfig)
    flags = [
        (f.name, _flag_type(hints[f.name]), field(default=f.default, metadata=f.metadata))
        for f in fields(LookbehindConfig)
    ]
    return dataclasses.make_dataclass("LookbehindFlags", flags, namespace={"_argument_group_name": "Lookbehind"})


def _number_or_word(value: Any) -> Any:
    # Python reads 1_0 as 10
    if isinstance(value, str) and "_" not in value:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag, no defaults that say nothing, examples as they were written."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "VALUE"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0 or "default: " in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


@dataclass
class Arguments:
    """What a command line says: one member per group of flags."""

    data: Any
    model: Any
    lookbehind: LookbehindConfig
    training: FinetuningArguments


class FlagParser(HfArgumentParser):
    """Parses `[settings.yaml|settings.json] --flag value ...` into `Arguments`.

    Args:
        data: dataclass of the data flags, a `DataArguments`.
        model: dataclass of the model flags, a `ModelArguments`.
        training: dataclass of the training flags.
        description: top of the help text.
    """

    def __init__(
        self,
        data: type = DataArguments,
        model: type = ModelArguments,
        training: type = FinetuningArguments,
        description: str | None = None,
    ) -> None:
        self.groups: dict[str, Any] = {
            "data": data,
            "model": model,
            "lookbehind": _lookbehind_flags(),
            "training": training,
        }
        super().__init__(
            list(self.groups.values()),
            allow_abbrev=False,
            usage="%(prog)s [SETTINGS.yaml|.json] --flag value ...",
            description=description,
            formatter_class=_HelpFormatter,
        )
        for action in self._actions:
            if _is_reserved(action.dest):
                action.help = argparse.SUPPRESS
            elif isinstance(action, argparse._StoreFalseAction):
                action.help = f"The same as --{action.dest} False."

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, argv: Sequence[str] | None = None) -> Arguments:
        """Check Lookbehind's flags, then files and folders, then the rest; nothing is written or downloaded.

        Raises:
            InputError: names the flag or file, its value and what is allowed.
        """
        values = self._values(argv)
        # through the text forms: alpha and rho take a number or a word, and the config says what is allowed
        settings = {name: _number_or_word(value) for name, value in values["lookbehind"].items()}
        try:
            lookbehind = LookbehindConfig(**settings)
        except InputError as error:
            raise InputError(f"--{error}") from error
        data = self.groups["data"](**values["data"])
        model = self.groups["model"](**values["model"])
        data.check_files()
        model.check_files()
        training = values["training"]
        output_dir = "trainer_output" if training["output_dir"] is None else training["output_dir"]
        check_output_dir(output_dir, resume_from(training["resume_from_checkpoint"]), data.inputs() | model.inputs())
        return Arguments(data, model, lookbehind, self.groups["training"](**training))

    def _values(self, argv: Sequence[str] | None) -> dict[str, dict[str, Any]]:
        """The values of each group by flag."""
        argv = [str(argument) for argument in (sys.argv[1:] if argv is None else argv)]
        if argv and argv[0].endswith((".yaml", ".yml", ".json")):
            # first, so that the flags after it override
            argv = self._flags_of_file(Path(argv[0])) + argv[1:]
        namespace, unknown = self.parse_known_args(_join_negative_numbers(argv))
        if unknown:
            self._refuse_unknown(unknown[0], argv)
        return {
            group: {f.name: getattr(namespace, f.name) for f in fields(kind) if f.init}
            for group, kind in self.groups.items()
        }

    def _flags_of_file(self, path: Path) -> list[str]:
        """The settings of a file as flags."""
        settings = _read_settings(path)
        known = {f.name for kind in self.groups.values() for f in fields(kind) if f.init}
        unknown = [str(key) for key in settings if key not in known]
        if unknown:
            hints = (f"{key!r}{_suggestion(key, known)}" for key in unknown)
            raise InputError(f"{path} has unknown settings: {', '.join(hints)}")
        flags = []
        for name, value in settings.items():
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                flags.append(f"--{name}={text}")
        return flags

    def _refuse_unknown(self, argument: str, argv: Sequence[str]) -> None:
        """No value is repeated: it might be a secret."""
        if not argument.startswith("-"):
            before = [word.partition("=")[0] for word in argv[: argv.index(argument)] if word.startswith("--")]
            where = f"after {before[-1]}" if before else "before the first flag"
            raise InputError(f"unexpected argument {where}: each flag is followed by its value, as in --k 2")
        flag = argument.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        raise InputError(f"unknown flag {flag}{_suggestion(flag.replace('-', '_').replace('__', '--', 1), known)}")


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """`--rho -1e-3` as `--rho=-1e-3`: argparse takes the number for a flag."""
    joined: list[str] = []
    for argument in argv:
        is_value = argument.startswith("-") and isinstance(_number_or_word(argument), int | float)
        if is_value and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _suggestion(name: str, known: Sequence[str] | set[str]) -> str:
    """An abbreviation suggests what it abbreviates, a slip what it resembles."""
    nearest = sorted((k for k in known if k.startswith(name)), key=len) or difflib.get_close_matches(name, known)
    return f": did you mean {nearest[0]}?" if nearest else ": --help lists the flags"


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file; a bare name that is not here is looked up among those that come with the programs."""
    if not path.is_file() and path.name == os.fspath(path):
        path = Path(str(resources.files("hf_lookbehind.scripts"))) / "recipes" / path
        if not path.is_file():
            raise InputError(f"{path.name}: there is no such file of settings, neither here nor in {path.parent}")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file of settings")
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # without the line itself, which might hold a secret
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"{path} cannot be read: {one_line(error.problem)}{line}") from error
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold settings as 'name: value', not a {type(settings).__name__}")
    return settings
