"""The runs of a study: trained and measured in worker processes, kept in a file that survives being killed."""

import contextlib
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ..config import InputError
from ..measures import compression, sharpness, weight_noise
from ..programs.cli.arguments import is_lower_better
from ..programs.registry import module_name
from ..trainer.flatness import measured_batches, rated_by
from . import second
from .study import Flags, Run, Trial, fill, references

# What a study may override. Nothing of a run is kept but its numbers.
QUIET: Flags = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}
_UNINTERESTING = ("runtime", "per_second", "samples")

context: Any = multiprocessing.get_context("spawn")


class Records:
    """Finished runs by key, and the file that they are appended to as JSON lines.

    What a killed study has left of its last line is cut off before the next one is written.

    Raises:
        InputError: a line, other than such a last one, is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes() if path.is_file() else b""
        self._size = content.rfind(b"\n") + 1
        self.by_key: dict[str, Trial] = {}
        for number, line in enumerate(content[: self._size].splitlines(), 1):
            try:
                record = json.loads(line)
                self.by_key[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not a run of a study") from error

    def add(self, record: Trial) -> None:
        with self._path.open("ab") as file:
            file.truncate(self._size)
            self._size += file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_key[record["key"]] = record


# ---- one run ----


def train_and_measure(run: Run, folders: Mapping[str, Path], output: Path) -> Trial:
    """The record of a run, in this process; its model goes to `output`.

    A training that ends in numbers that are not finite is a result too: its metrics are None.

    Raises:
        InputError: the program refuses the flags.
    """
    program = importlib.import_module(module_name(run.program)).PROGRAM
    metrics, found = {}, {}
    try:
        results = program.train(argv(run, folders, output.parent) + [f"--output_dir={output}"])
    except FloatingPointError as error:
        return _record(run, {}, {"diverged": str(error)})
    for name, value in results.metrics.items():
        if name.startswith(("train_loss", "eval_", "test_")) and not name.endswith(_UNINTERESTING):
            metrics[name] = _finite(value)
    losses = [value for name, value in metrics.items() if name.endswith("loss")]
    if None in losses:
        found["diverged"] = "a loss is not finite"
    else:
        found |= _measure(run, results)
        if second.KEY in run.measures:
            found["second"] = _finetune_again(run.measures[second.KEY], results, folders, output)
    # of a stream, those of all tasks
    steps = results.metrics.get("train_steps", results.trainer.state.global_step)
    counted = {"steps": steps, "passes": results.metrics["train_gradient_passes"]}
    return _record(run, metrics, counted | {"seconds": round(results.metrics["train_runtime"], 2)} | found)


def _finite(value: float) -> float | None:
    """JSON has neither nan nor infinity."""
    return value if math.isfinite(value) else None


def _record(run: Run, metrics: dict[str, Any], more: Trial) -> Trial:
    return {"key": run.key, **run.labels, "metrics": metrics, **more}


def _measure(run: Run, results: Any) -> Trial:
    """Noise, compression and sharpness of the final model. The loss is the model's own: without label smoothing."""
    trainer, found = results.trainer, {}
    if "weight_noise" in run.measures:
        asked = run.measures["weight_noise"]
        records = weight_noise(
            trainer.model,
            _rated(results, asked["metric"]),
            asked["sigmas"],
            draws=asked["draws"],
            seed=run.labels["seed"],
            greater_is_better=not is_lower_better(asked["metric"]),
        )
        found["weight_noise"] = [
            {name: _finite(r[name]) for name in ("sigma", "mean", "sd", "worst")} for r in records
        ]
    if "compression" in run.measures:
        asked = run.measures["compression"]
        records = compression(trainer.model, _rated(results, asked["metric"]), asked["forms"])
        found["compression"] = [
            {"form": r["form"], "value": _finite(r["value"]), "change": _finite(r["change"])} for r in records
        ]
    if "sharpness" in run.measures:
        asked = run.measures["sharpness"]
        batches = measured_batches(trainer, results.datasets[asked["on"]], asked["max_examples"])
        batches = [trainer._prepare_inputs(batch) for batch in batches]
        rises = sharpness(trainer.model, batches, asked["rhos"], steps=asked["steps"])
        found["sharpness"] = [{"rho": rho, "rise": _finite(rise)} for rho, rise in rises.items()]
    return found


def _finetune_again(asked: Mapping[str, Any], results: Any, folders: Mapping[str, Path], output: Path) -> Trial:
    """What of the first task is `kept` after another, and how that one went. The first Trainer's model is lost."""
    run, place = second.second_run(asked), output.parent / "second"
    place.mkdir()
    flags = [*argv(run, folders, place), f"--model_name_or_path={output}", f"--output_dir={place / 'model'}"]
    found = second.finetune_again(run, flags, asked["reach"], results.trainer.model)
    has_ended = found["steps"] is not None
    return found | {"kept": _finite(_rated(results, asked["metric"])(results.trainer.model)) if has_ended else None}


def _rated(results: Any, name: str) -> Callable[[Any], float]:
    """A function of a model that gives a metric, as test_accuracy; what is better when lower is infinite for nan."""
    part, _, metric = name.partition("_")
    rated = rated_by(results.trainer, results.datasets[{"eval": "validation"}.get(part, part)], metric)
    lower_is_better = is_lower_better(metric)

    def evaluate(model: Any) -> float:
        value = rated(model)
        return math.inf if lower_is_better and math.isnan(value) else value

    return evaluate


def argv(run: Run, folders: Mapping[str, Path], folder: Path) -> list[str]:
    """The flags as a file of settings, which the programs read."""
    # a launcher's processes write one each
    path = folder / f"settings-{os.environ.get('RANK', 0)}.yaml"
    path.write_text(yaml.safe_dump(QUIET | fill(run.flags, folders)), encoding="utf-8")
    return [str(path)]


def check(run: Run, folders: Mapping[str, Path]) -> None:
    """Let the program look at the flags, but for those that name a folder that is still to come.

    Raises:
        InputError: it refuses them.
    """
    known = {name: value for name, value in run.flags.items() if not set(references(value)) & set(run.references)}
    program = importlib.import_module(module_name(run.program)).PROGRAM
    with tempfile.TemporaryDirectory() as folder, _naming(run):
        settings = argv(Run(run.labels, run.program, known), folders, Path(folder))
        program.make_parser().parse([*settings, f"--output_dir={folder}/model"])


@contextlib.contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{run}: {error}") from error


# ---- many runs ----


class Workers:
    """Processes of one thread each, which outlive none of their jobs' caller: a context manager.

    Args:
        number: of them.
        share: whether each has a GPU of its own, where there are any; a launcher wants them all.
    """

    def __init__(self, number: int, share: bool = True) -> None:
        self._number = number
        self._devices: list[str | None] = [*devices()] if share and devices() else [None]
        self._idle: list[Any] = []  # connections
        self._processes: list[Any] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, failure: Any, *_: Any) -> None:
        for connection in self._idle:
            connection.close()  # on which its process ends
        for process in self._processes:
            if failure is not None:
                process.terminate()
            process.join()

    def run(self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """`work(*job)` for each job; yields (job, result) as they come.

        Raises:
            InputError: a job has raised it.
            RuntimeError: a job has raised anything else, or its process has died.
        """
        waiting, busy = list(reversed(jobs)), {}
        while waiting or busy:
            while waiting and len(busy) < self._number:
                connection = self._idle.pop() if self._idle else self._start()
                busy[connection] = waiting.pop()
                connection.send((work, busy[connection]))
            for connection in wait(list(busy)):
                job = busy.pop(connection)
                result = _receive(connection, job)
                self._idle.append(connection)
                yield job, result

    def _start(self) -> Any:
        ours, theirs = context.Pipe()
        self._processes.append(
            context.Process(target=_serve, args=(theirs, self._devices[len(self._processes) % len(self._devices)]))
        )
        self._processes[-1].start()
        theirs.close()
        return ours


def _receive(connection: Any, job: tuple[Any, ...]) -> Any:
    try:
        result, refused, failed = connection.recv()
    except EOFError as error:
        raise RuntimeError(f"{job[0]}: the process died; was there too little memory?") from error
    if refused:
        raise InputError(f"{job[0]}: {refused}")
    if failed:
        raise RuntimeError(f"{job[0]}: {failed}")
    return result


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def devices() -> list[str]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them: a worker has one for its own."""
    count, seen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[:count] if seen else [str(i) for i in range(count)]


def _serve(connection: Connection, device: str | None) -> None:
    """A worker: does one job after another until the other end closes, or dies; on a GPU of its own, if it has one."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before the first use of CUDA here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is interrupted too, and ends this process
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    is_new = True
    with contextlib.suppress(EOFError):
        while True:
            work, job = connection.recv()
            said, refused, failed, result = io.StringIO(), "", "", None
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    result = work(*job)
                except InputError as error:
                    refused = str(error)
                except Exception as error:
                    # told to the other end, which stops
                    failed = f"{type(error).__name__}: {error}\n{said.getvalue()}"
            connection.send((result, refused, failed))
            if is_new:
                # each training collects garbage, in which the libraries, imported by now, take half a second
                gc.collect()
                gc.freeze()
                is_new = False
