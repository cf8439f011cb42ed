"""One training of a comparison in several processes, started by a launcher: torchrun, accelerate launch, deepspeed.

torchrun --nproc_per_node 2 -m hf_lookbehind.compare.launched JOB.json
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..config import InputError
from ..programs.cli.running import is_main_process, one_line, run_program
from .runs import train_and_measure
from .study import Run, Trial


def train_launched(run: Run, folders: Mapping[str, Path], output: Path, launcher: Sequence[str]) -> Trial:
    """`train_and_measure` by the processes that a launcher starts; the record is that of the main one.

    Args:
        launcher: words of a command that takes `-m MODULE ARGUMENT`.

    Raises:
        InputError: the program refuses the flags, or there is no such launcher.
        RuntimeError: it ended with another error, whose last lines are in the message.
    """
    job, result = output.parent / "job.json", output.parent / "record.json"
    places = {name: str(Path(folder).absolute()) for name, folder in folders.items()}
    job.write_text(json.dumps({"run": asdict(run), "folders": places, "output": str(output)}), encoding="utf-8")
    try:
        ended = subprocess.run(
            [*launcher, "-m", __name__, str(job)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        raise InputError(f"--launcher {launcher[0]} cannot be started: {one_line(error)}") from error
    if result.is_file():
        record = json.loads(result.read_text(encoding="utf-8"))
        if "refused" in record:
            raise InputError(record["refused"])
        return record
    raise RuntimeError(f"{' '.join(launcher)} ended with exit code {ended.returncode}:\n{ended.stderr[-2000:]}")


def _work(job: Path) -> None:
    content = json.loads(job.read_text(encoding="utf-8"))
    folders = {name: Path(folder) for name, folder in content["folders"].items()}
    record: Trial
    try:
        record = train_and_measure(Run(**content["run"]), folders, Path(content["output"]))
    except InputError as error:
        record = {"refused": one_line(error)}
    if is_main_process():
        (job.parent / "record.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    if "refused" in record:
        raise InputError(record["refused"])


def main() -> int:
    return run_program(lambda status: _work(Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
