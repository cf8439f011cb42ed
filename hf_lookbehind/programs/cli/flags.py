"""Flags of the programs, from the command line or a file of settings, in the groups Data, Model, Lookbehind, ..."""

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ...config import InputError, LookbehindConfig
from ...hub.redact import redact_flags
from .arguments import DataArguments, FinetuningArguments, ModelArguments, SearchArguments, is_reserved
from .lookahead import check_lookahead
from .matched import match_optimizer
from .method_flags import lookbehind_config, lookbehind_flags, number_or_word, of_method, set_by_method
from .paths import check_output_dir, resume_from
from .settings_file import read_settings
from .sharing import HUB_FLAGS, HubArguments, take_hub_arguments

# Flags of the Trainer that have another name in this version, or another way.
_RENAMED = {
    "evaluation_strategy": "--eval_strategy",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "include_tokens_per_second": "--include_num_input_tokens_seen",
    "no_cuda": "--use_cpu",
    "warmup_ratio": "--warmup_steps, below 1 a fraction of all steps",
}
# What YAML takes for truth values, and what it means to flags that are none and have no list of choices.
_TRUTH: dict[str, str] = {
    **dict.fromkeys(("yes", "on", "true", "y"), "yes"),
    **dict.fromkeys(("no", "off", "false", "n"), "no"),
}
_WORDS = {"report_to": {"no": "none"}, "resume_from_checkpoint": {"yes": "true", "no": "false"}}


# Of TrainingArguments, what --help shows; --help-all shows the hundred others.
_COMMON = frozenset(
    "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps seed optim lr_scheduler_type warmup_steps weight_decay max_grad_norm bf16 fp16 "
    "eval_strategy save_strategy load_best_model_at_end metric_for_best_model logging_steps report_to push_to_hub "
    "hub_model_id".split()
)


class _HelpAll(argparse.Action):
    """`--help-all`: the help with all flags."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: Any, *_: Any) -> None:
        sys.stdout.write(parser.format_help(everything=True))
        parser.exit()


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
    search: SearchArguments
    training: FinetuningArguments
    hub: HubArguments | None = None
    flags: Sequence[str] = ()  # that it consists of, those of a file among them; without secrets and machine's paths
    matches: LookbehindConfig | None = None  # what --method matched is matched to


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
            "lookbehind": lookbehind_flags(),
            "search": SearchArguments,
            "training": training,
        }
        super().__init__(
            list(self.groups.values()),
            allow_abbrev=False,
            usage="%(prog)s [SETTINGS.yaml|.json] --flag value ...",
            description=description,
            formatter_class=_HelpFormatter,
        )
        own = {f.name for f in fields(training)} - {f.name for f in fields(TrainingArguments)}
        self._rare = {f.name for f in fields(TrainingArguments)} - _COMMON - own
        self.add_argument("--help-all", action=_HelpAll, help="Show all flags, and exit.")
        # at every save is the Trainer's default
        self.set_defaults(hub_strategy="end")
        for action in self._actions:
            if action.dest in HUB_FLAGS:
                action.help = HUB_FLAGS[action.dest]
            elif is_reserved(action.dest):
                action.help = argparse.SUPPRESS
            elif isinstance(action, argparse._StoreFalseAction):
                action.help = f"The same as --{action.dest} False."

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def format_help(self, everything: bool = False) -> str:
        """Without the flags of `TrainingArguments` that few need, unless everything is wanted."""
        rare = [] if everything else [action for action in self._actions if action.dest in self._rare]
        shown = [(action, action.help) for action in rare]
        try:
            for action in rare:
                action.help = argparse.SUPPRESS
            text = super().format_help()
        finally:
            for action, said in shown:
                action.help = said
        return (
            text
            if everything
            else f"{text}\n--help-all: and {len({a.dest for a in rare})} more of TrainingArguments\n"
        )

    def parse(self, argv: Sequence[str] | None = None) -> Arguments:
        """Check Lookbehind's flags, then files and folders, then the rest; nothing is written or downloaded.

        Raises:
            InputError: names the flag or file, its value and what is allowed.
        """
        given = self._all_flags(argv)
        values = self._values(given)
        asked = lookbehind_config(values["lookbehind"])
        is_matched = values["lookbehind"]["method"] == "matched"
        lookbehind = of_method(values["lookbehind"]["method"], asked)
        search = SearchArguments(**values["search"])
        data = self.groups["data"](**values["data"])
        model = self.groups["model"](**values["model"])
        data.check_files()
        model.check_files()
        given_training = values["training"]
        output_dir = "trainer_output" if given_training["output_dir"] is None else given_training["output_dir"]
        resume = resume_from(given_training["resume_from_checkpoint"])
        self.check_output_dir(output_dir, resume, data.inputs() | model.inputs())
        hub = take_hub_arguments(given_training, output_dir)
        training = self.groups["training"](**given_training)
        check_lookahead(training, lookbehind)
        if is_matched:
            if search.rho_search is not None:
                raise InputError(
                    "--rho_search is not allowed with --method matched, which sets the radius: --method sam"
                )
            match_optimizer(training, asked)
        matches = asked if is_matched else None
        return Arguments(data, model, lookbehind, search, training, hub, redact_flags(given), matches)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that a command line gives, or the file that it names, with their values; not looked at further.

        Raises:
            InputError: one is unknown, or of another type.
        """
        words = self._all_flags(argv)
        values = {name: value for group in self._values(words).values() for name, value in group.items()}
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in words)
        return {action.dest: values[action.dest] for action in actions if action is not None and action.dest in values}

    def check_output_dir(self, name: str, resume: str | bool | None, inputs: Mapping[str, str | None]) -> None:
        """Refuse a folder that cannot be written, or resumed from; see `paths.check_output_dir`."""
        check_output_dir(name, resume, inputs)

    def _all_flags(self, argv: Sequence[str] | None) -> list[str]:
        """Those of the command line, or of the file that it names and those after it."""
        argv = [str(argument) for argument in (sys.argv[1:] if argv is None else argv)]
        if argv and argv[0].endswith((".yaml", ".yml", ".json")):
            # first, so that the flags after it override; --method does so of what it sets
            argv = self._flags_of_file(Path(argv[0]), without=set_by_method(argv[1:])) + argv[1:]
        return argv

    def _values(self, argv: list[str]) -> dict[str, dict[str, Any]]:
        """The values of each group by flag."""
        namespace, unknown = self.parse_known_args(_join_negative_numbers(argv))
        if unknown:
            self._refuse_unknown(unknown[0], argv)
        return {
            group: {f.name: getattr(namespace, f.name) for f in fields(kind) if f.init}
            for group, kind in self.groups.items()
        }

    def _flags_of_file(self, path: Path, without: Collection[str]) -> list[str]:
        """The settings of a file as flags, but for some names."""
        settings = read_settings(path)
        known = {f.name for kind in self.groups.values() for f in fields(kind) if f.init}
        unknown = [str(key) for key in settings if key not in known]
        if unknown:
            hints = (f"{key!r}{_suggestion(key, known)}" for key in unknown)
            raise InputError(f"{path} has unknown settings: {', '.join(hints)}")
        flags = []
        for name, value in settings.items():
            if name in without:
                continue
            value = "no" if value == [] and name in _WORDS else value
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None:
                flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else self._word(name, value)}")
        return flags

    def _word(self, name: str, text: str) -> str:
        """A value as the flag takes it: files say yes, no and nothing in all the words that YAML has for them."""
        action, said = self._option_string_actions[f"--{name}"], _TRUTH.get(text.lower())
        words = _WORDS.get(name, {"no": next((word for word in action.choices or () if word in ("no", "none")), text)})
        if said is None or text in (action.choices or ()):
            return text
        return {"yes": "true", "no": "false"}[said] if action.type is string_to_bool else words.get(said, text)

    def _refuse_unknown(self, argument: str, argv: Sequence[str]) -> None:
        """No value is repeated: it might be a secret."""
        if not argument.startswith("-"):
            before = [word.partition("=")[0] for word in argv[: argv.index(argument)] if word.startswith("--")]
            where = f"after {before[-1]}" if before else "before the first flag"
            raise InputError(f"unexpected argument {where}: each flag is followed by its value, as in --k 2")
        flag = argument.partition("=")[0]
        if flag[2:] in _RENAMED:
            raise InputError(f"unknown flag {flag}: it is now {_RENAMED[flag[2:]]}")
        known = [name for name in self._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        raise InputError(f"unknown flag {flag}{_suggestion(flag.replace('-', '_').replace('__', '--', 1), known)}")


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """`--rho -1e-3` as `--rho=-1e-3`: argparse takes the number for a flag."""
    joined: list[str] = []
    for argument in argv:
        is_value = argument.startswith("-") and isinstance(number_or_word(argument), int | float)
        if is_value and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _suggestion(name: str, known: Sequence[str] | set[str]) -> str:
    """An abbreviation suggests what it abbreviates, a slip what it resembles."""
    nearest = sorted((k for k in known if k.startswith(name)), key=len) or difflib.get_close_matches(name, known)
    return f": did you mean {nearest[0]}?" if nearest else ": --help lists the flags"
