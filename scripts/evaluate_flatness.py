"""Measure how flat and how robust to noisy or compressed weights models are: one, or several side by side.

Models come first, folders or Hub ids; then what is measured; then the flags that say which data. These are the flags
of the program that trains such models (image-classification, text-classification, clm, seq2seq; the first model's
config tells which):

    hf-lookbehind flatness runs/adamw runs/lookbehind --sigma 0.1 0.2 0.3 --rho 0.02 0.05 \\
        --compress int4 int3 nf4 prune:0.7 --dataset_name digits --train_split "train[:1000]" \\
        --test_split "train[1256:]" --output_dir runs/flatness

Measured on the test split if the flags name one, else on the validation split: the metric as it is, its mean over
draws of weight noise for each --sigma, the metric with the weights quantised or pruned as each --compress says, the
rise of the loss within each --rho, the largest eigenvalues of the Hessian (--hessian N). A number that overflows is
inf; what cannot be measured is nan, or left out, and a line says why: the rest is measured all the same. A table is
printed; flatness.json, flatness.csv, flatness.png (of the noise) and compression.png go to --output_dir. With
--update_cards they go to the folder of each model too, and its model card is written again with what was measured of
it.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from hf_lookbehind import InputError, LookbehindConfig
from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.hub.card.measured import write_flatness
from hf_lookbehind.hub.card.render import load as load_card
from hf_lookbehind.hub.card.render import save as save_card
from hf_lookbehind.hub.file_names import ADAPTER_CONFIG_NAME, CONFIG_NAME
from hf_lookbehind.hub.redact import redact_flags
from hf_lookbehind.measures import compression, hessian_eigenvalues, sharpness, weight_noise
from hf_lookbehind.measures.accepted import check_choice, check_numbers
from hf_lookbehind.measures.compression import ALLOWED, checked_forms
from hf_lookbehind.measures.sharpness import KINDS as SHARPNESS_KINDS
from hf_lookbehind.measures.weight_noise import KINDS as NOISE_KINDS
from hf_lookbehind.programs.checks.earlier import FLATNESS_NAMES, remove_earlier_run
from hf_lookbehind.programs.cli.arguments import ModelArguments, is_lower_better
from hf_lookbehind.programs.cli.lock import check_free, hold
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import (
    OneLineParser,
    RunStatus,
    from_main_process,
    is_main_process,
    no_empty_folder,
    one_line,
    quiet_libraries,
    reported,
    run_program,
)
from hf_lookbehind.programs.models.loading import load_config
from hf_lookbehind.programs.registry import PROGRAMS, module_name, program_of
from hf_lookbehind.report import fit_terminal
from hf_lookbehind.report.side_by_side import draw, results_table, write_csv
from hf_lookbehind.trainer.flatness import measured_batches, metric_of, metrics_on, rated_by

PLAIN = LookbehindConfig(k=0)
# Lanczos steps at most, unless more eigenvalues are asked for.
HESSIAN_STEPS = 100
# Of a model without second derivatives, say, or one too large. Of several processes one may
# be alone with its error, and the others would wait for it.
_OWN_ERRORS = (RuntimeError,) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else ()


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__,
        usage="%(prog)s MODEL [MODEL ...] [--sigma ...] [--compress ...] [--rho ...] [--hessian N] "
        "--dataset_name ... --flag value ...",
    )
    add = parser.add_argument
    add("--sigma", type=float, nargs="+", default=[], help="Levels of weight noise.")
    add("--noise_kind", default="multiplicative", help="'multiplicative' (default): w (1 + sigma z), or 'additive'.")
    add("--draws", type=int, default=10, help="Draws of the noise, for each level. Default: 10.")
    add(
        "--compress",
        nargs="+",
        default=[],
        metavar="FORM",
        help=f"Weights rounded or pruned: {ALLOWED}.",
    )
    add("--rho", type=float, nargs="+", default=[], help="Radii within which the rise of the loss is measured.")
    add("--sharpness_kind", default="worst", help="'worst' (default), 'average' or 'one_step' (m-sharpness).")
    add("--sharpness_steps", type=int, default=10, help="Ascent steps, or draws for 'average'. Default: 10.")
    add("--adaptive", action="store_true", help="Radii are scaled by the weights, as in ASAM.")
    add("--hessian", type=int, default=0, metavar="N", help="The N largest eigenvalues. Default: 0, none.")
    add("--max_examples", type=int, default=512, help="Of the split, for sharpness and Hessian. Default: 512.")
    add("--measure_seed", type=int, default=0, help="Seed of all draws. Default: 0.")
    add("--update_cards", action="store_true", help="Write what was measured into each model's folder and card too.")
    add("--output_dir", default="runs/flatness", help="Folder of the results. Default: runs/flatness.")
    return parser


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and its data.

    Attributes:
        name: for the reader; no path of this machine.
        trainer: holds the model; trains nothing.
        data: the split.
        split: its name.
        metric: that rates the model, without a prefix.
    """

    name: str
    trainer: Any
    data: Any
    split: str
    metric: str

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.model


def parse(argv: Sequence[str] | None) -> tuple[list[str], argparse.Namespace, list[str]]:
    """Models, what is measured, and the flags of the program.

    Raises:
        InputError: there is no model, nothing to measure, or no card to be written again.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    args, rest = make_parser().parse_known_args(argv[first:])
    if first > 7 and (args.sigma or args.compress):
        raise InputError(f"{first} models are given: 7 at most can be told apart in a picture")
    if first == 0:
        raise InputError("no model is given: folders or ids of models come first, then the flags")
    if not (args.sigma or args.compress or args.rho or args.hessian):
        raise InputError("nothing is to be measured: give --sigma, --compress, --rho or --hessian")
    for name in ("draws", "sharpness_steps", "max_examples"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} is not allowed: 1 or more")
    check_numbers("--sigma", args.sigma or [0], of="noise levels", least=0)
    check_numbers("--rho", args.rho or [0], of="radii", least=0)
    if args.compress:
        checked_forms("--compress", args.compress)
    check_choice("--noise_kind", args.noise_kind, NOISE_KINDS)
    check_choice("--sharpness_kind", args.sharpness_kind, SHARPNESS_KINDS)
    if args.update_cards:
        for name in argv[:first]:
            try:
                load_card(name)
            except InputError as error:
                raise InputError(f"--update_cards: {error}") from error
    if args.hessian < 0:
        raise InputError(f"--hessian {args.hessian} is not allowed: 0 or more")
    check_folder_to_write("--output_dir", args.output_dir)
    held = next((name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) if Path(args.output_dir, name).exists()), None)
    if held is not None:
        raise InputError(
            f"--output_dir {args.output_dir!r} holds a model ({held}): results need a folder of their own"
        )
    return argv[:first], args, rest


def program_for(model: str) -> Any:
    """The program that trains such models.

    Raises:
        InputError: the model cannot be read, or is of a kind that no program trains.
    """
    arguments = ModelArguments(model_name_or_path=model)
    arguments.check_files()
    config = load_config(arguments)
    architectures = (config and config.architectures) or []
    for program in filter(None, map(program_of, architectures)):
        return importlib.import_module(module_name(program)).PROGRAM
    endings = ", ".join(ending for entry in PROGRAMS.values() for ending in entry.heads)
    raise InputError(
        f"{model!r} is {' or '.join(architectures) or 'of no known kind'}: a class that ends with one of "
        f"{endings} is needed"
    )


def load(names: Sequence[str], args: argparse.Namespace, rest: Sequence[str]) -> list[Subject]:
    """All models, each with the data as its own processor or tokenizer prepares them."""
    program, subjects = program_for(names[0]), []
    if any(word.partition("=")[0] == "--model_name_or_path" for word in rest):
        raise InputError("--model_name_or_path is not allowed: folders or ids of models come first, then the flags")
    make_parser().refuse_slips(rest, program.make_parser())
    for name in names[1:]:
        if program_for(name) is not program:
            raise InputError(f"{name!r} is of another kind than {names[0]!r}: measure them in runs of their own")
    labels = [Path(name).name for name in names]
    for i, name in enumerate(names):
        flags = [
            *rest,
            f"--model_name_or_path={name}",
            f"--output_dir={args.output_dir}",
            "--report_to=none",
            "--disable_tqdm=1",
        ]
        parsed = program.make_parser().parse(flags)
        task = program.prepare(parsed)
        split = next((name for name in ("test", "validation") if name in task.datasets), None)
        if split is None:
            files = ", --test_file" if hasattr(parsed.data, "test_file") else ""
            raise InputError(f"there is nothing to measure on: give --test_split{files}, or --train_val_split above 0")
        set_seed(parsed.training.seed)
        trainer = task.make_trainer(task.make_model(parsed.training.seed, parsed.model), parsed.training, PLAIN)
        # of one name, the second says which it is
        label = labels[i] if labels.count(labels[i]) == 1 else f"{labels[i]} ({i + 1})"
        metric = next(iter(task.metrics.keys), "loss")
        # as its flag calls it
        said = getattr(parsed.data, f"{split}_split") or split
        size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        if args.hessian > size:
            raise InputError(f"--hessian {args.hessian} is not allowed: {name!r} has {size} parameters to train")
        subjects.append(Subject(label, trainer, task.datasets[split], said, metric))
    return subjects


def measure(subject: Subject, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """All that is asked for, as plain data, into a record. All processes call it, and get the same.

    What cannot be measured is in `not_measured`, with the reason, and on stderr; the rest is measured all the same.
    """
    trainer, model = subject.trainer, subject.model.to(subject.trainer.args.device)
    clean = metrics_on(trainer, subject.data)
    record |= {
        "model": subject.name,
        "metric": subject.metric,
        "split": subject.split,
        "examples": len(subject.data),
        "value": metric_of(clean, subject.metric),
        "loss": metric_of(clean, "loss"),
    }
    batches = measured_batches(trainer, subject.data, args.max_examples) if args.rho or args.hessian else []
    how = {
        "weight_noise": lambda: _weight_noise(subject, args),
        "compression": lambda: compression(subject.model, _rated(subject), args.compress),
        "sharpness": lambda: _sharpness(model, batches, args),
        "hessian_eigenvalues": lambda: hessian_eigenvalues(
            model, batches, args.hessian, seed=args.measure_seed, steps=max(HESSIAN_STEPS, args.hessian)
        ),
    }
    for name, is_wanted in zip(how, (args.sigma, args.compress, args.rho, args.hessian), strict=True):
        if is_wanted:
            _attempt(record, name, how[name])


def _attempt(record: dict[str, Any], name: str, find: Callable[[], Any]) -> None:
    """What `find` gives, under its name, or why there is none; warnings say of which model they are."""
    problems = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LookbehindWarning)
        try:
            record[name] = find()
        except (InputError, *_OWN_ERRORS) as error:
            why = one_line(error) if isinstance(error, InputError) else one_line(f"{type(error).__name__}: {error}")
            record.setdefault("not_measured", {})[name] = why
            problems.append(f"{name.replace('_', ' ')} not measured: {why}")
    for warning in caught:
        if issubclass(warning.category, LookbehindWarning):
            problems.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for problem in problems if is_main_process() else ():
        sys.stderr.write(f"{record['model']}: {problem}\n")


def _rated(subject: Subject) -> Callable[[Any], float]:
    return rated_by(subject.trainer, subject.data, subject.metric)


def _weight_noise(subject: Subject, args: argparse.Namespace) -> list[dict[str, Any]]:
    return weight_noise(
        subject.model,
        _rated(subject),
        args.sigma,
        kind=args.noise_kind,
        draws=args.draws,
        seed=args.measure_seed,
        greater_is_better=not is_lower_better(subject.metric),
    )


def _sharpness(model: Any, batches: Sequence[Any], args: argparse.Namespace) -> list[dict[str, float]]:
    kind = {"kind": args.sharpness_kind, "steps": args.sharpness_steps, "adaptive": args.adaptive}
    found = sharpness(model, batches, args.rho, seed=args.measure_seed, **kind)
    return [{"rho": rho, "rise": rise} for rho, rise in found.items()]


def save(records: Sequence[dict[str, Any]], settings: dict[str, Any], folder: Path) -> None:
    """As JSON, as a CSV with a row per number, and as pictures where there is noise or compression to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    write_flatness(folder, records, settings, draw(records, settings["noise_kind"], folder))
    write_csv(records, folder)


def evaluate(argv: Sequence[str] | None = None, status: RunStatus | None = None) -> list[dict[str, Any]]:
    """Measure as the flags say; returns a record per model.

    Raises:
        InputError: the input cannot be used; nothing has been written.
    """
    with reported(status) as status, ExitStack() as held:
        return _evaluate(argv, status, held)


def _evaluate(argv: Sequence[str] | None, status: RunStatus, held: ExitStack) -> list[dict[str, Any]]:
    with quiet_libraries():
        names, args, rest = parse(argv)
        status.output_dir = folder = Path(args.output_dir)
        from_main_process(lambda: check_free(folder))
        with no_empty_folder(folder):
            subjects = load(names, args, rest)
        if args.update_cards:
            from_main_process(lambda: _hold_models(names, held))
        status.start(lambda: remove_earlier_run(folder, FLATNESS_NAMES))
        settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "update_cards")}
        settings["flags"] = redact_flags(rest)  # of the program, such as those of the data
        records: list[dict[str, Any]] = []
        try:
            for subject in subjects:
                record: dict[str, Any] = {}
                records.append(record)
                measure(subject, args, record)
        finally:  # what has been measured is kept, also where something ends it
            records = [record for record in records if record]
            if records and is_main_process():
                save(records, settings, folder)
    if is_main_process() and args.update_cards:
        for name, record in zip(names, records, strict=True):
            save([record], settings, Path(name))
            save_card(load_card(name), name)
    return records


def _hold_models(names: Sequence[str], held: ExitStack) -> None:
    """No run starts in the folders of models whose cards are written again, and none is going on there."""
    for folder in sorted({Path(name).resolve() for name in names}):
        held.enter_context(hold(folder, "the model"))


def main(argv: Sequence[str] | None = None) -> int:
    """`evaluate`, a table, and an exit code (see `run_program`)."""
    return run_program(
        lambda status: evaluate(argv, status), lambda records: print(f"\n{fit_terminal(results_table(records))}")
    )


if __name__ == "__main__":
    sys.exit(main())
