"""Running a program: exit codes, one line per bad input, `run_status.json`."""

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import datasets
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ...config import InputError
from . import interrupt
from .lock import hold

DONE = 0
FAILED = 1
BAD_INPUT = 2
NOT_PUSHED = 3
INTERRUPTED = 130
PREEMPTED = 143  # what a shell reports of a program that SIGTERM has ended

STATUS_NAME = "run_status.json"
SEARCH_NAME = "rho_search.json"
RUNS_NAME = "runs.jsonl"  # of a comparison


def is_main_process() -> bool:
    """Rank 0, by the launcher's environment: known before any process group is."""
    return int(os.environ.get("RANK", 0)) == 0


def from_main_process(find: Callable[[], Any]) -> Any:
    """What `find` gives in the main process, in all of them: what it looks at may be on that machine alone.

    Raises:
        InputError: in all of them, where it does in the main process.
    """
    found, problem = None, ""
    if is_main_process():
        try:
            found = find()
        except InputError as error:
            problem = one_line(error)
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise InputError(problem)
    return found


def one_line(message: Any) -> str:
    """A message of several lines as one. A data loader's worker sends a traceback: its last line is the message."""
    text = str(message).strip()
    if text.startswith("Caught ") and "\n" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


class OneLineParser(argparse.ArgumentParser):
    """A program's parser: what it cannot parse is an `InputError`, one line, as of all bad input.

    Its help is a docstring as it stands, and no flag may be shortened.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def refuse_slips(self, rest: Sequence[str], other: argparse.ArgumentParser) -> None:
        """Of what is left for another parser, refuse a flag that is most like one of this one: it would not know that.

        Raises:
            InputError: names the flag, and which was meant.
        """
        own, others = self._option_string_actions, other._option_string_actions
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            meant = [] if flag in others else difflib.get_close_matches(flag, [*own, *others], n=1, cutoff=0.8)
            if meant and meant[0] in own:
                raise InputError(f"unknown flag {flag}: did you mean {meant[0]}?")


class Preempted(Exception):
    """SIGTERM has ended the training, after a checkpoint."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """In the block: no warnings of transformers and datasets, progress on a terminal only. Bad input is one line."""
    verbosity, datasets_verbosity = logging.get_verbosity(), datasets.logging.get_verbosity()
    logging.set_verbosity_error()
    # what it cannot read it logs as an error, and then raises
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with bars_on_terminals():
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            datasets.logging.set_verbosity(datasets_verbosity)


def bars_are_shown() -> bool:
    """Whether there is a terminal to show progress on: in a file each state of a bar stays."""
    return is_main_process() and sys.stderr.isatty()


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """In the block the libraries show their progress on a terminal only."""
    if bars_are_shown():
        yield
        return
    shown = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for was_shown, enable in zip(shown, (datasets.enable_progress_bars, logging.enable_progress_bar), strict=True):
            if was_shown:
                enable()


class RunStatus:
    """What became of a run, for whoever finds its folder: a launcher turns every exit code but 0 into 1.

    `output_dir` is set as soon as it is known to be usable; `start` is called when every input that can be checked
    has been, right before the first file is written, and holds the folder until `release`. `not_pushed` says why what
    is done did not get to the Hub.
    """

    def __init__(self, output_dir: Path | None = None) -> None:
        self.output_dir = output_dir
        self.started = False
        self.not_pushed = ""
        self._held = ExitStack()

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Take the folder, and write that a run is going on there. All processes call it; again, it does nothing.

        Args:
            prepare: what is to be done first, by the main process, which holds the folder by then.

        Raises:
            InputError: in all of them, where another run is going on in the folder, or `prepare` raises it.
        """
        if not self.started:
            from_main_process(lambda: self._take(prepare))
        self.started = True

    def _take(self, prepare: Callable[[], None]) -> None:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(hold(self.output_dir))
        prepare()
        self._write("running", None, "")

    def release(self) -> None:
        """Let another run have the folder."""
        self._held.close()

    def done(self) -> None:
        if self.started and is_main_process():
            if self.not_pushed:
                self._write("trained, not pushed", NOT_PUSHED, self.not_pushed)
            else:
                self._write("done", DONE, "")

    def fail(self, status: str, exit_code: int, message: str) -> None:
        """Record a failure after the start, if the disk allows it.

        Any process may be the one that fails; the first one's reason is the one that counts.
        """
        if self.started:
            with suppress(OSError, ValueError, KeyError):
                if self._read().get("status") == "running":
                    self._write(status, exit_code, message)

    def exit_code(self) -> int | None:
        """Of the run that the folder is of, if it has ended and can be read."""
        with suppress(OSError, ValueError):
            return self._read().get("exit_code")
        return None

    def _read(self) -> dict[str, Any]:
        if self.output_dir is None:
            return {}
        path = self.output_dir / STATUS_NAME
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(self, status: str, exit_code: int | None, message: str) -> None:
        if self.output_dir is None:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        # renamed into place: a reader never sees half a file
        unfinished = self.output_dir / f".{STATUS_NAME}.{os.getpid()}"
        text = json.dumps({"status": status, "exit_code": exit_code, "message": message}, indent=2) + "\n"
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self.output_dir / STATUS_NAME)
        except OSError:
            # a full disk may still take it instead of the old one
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            _overwrite(self.output_dir / STATUS_NAME, text)


def _overwrite(path: Path, text: str) -> None:
    """Without giving back the space that the file has."""
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()


@contextmanager
def reported(status: RunStatus | None) -> Iterator[RunStatus]:
    """The status of the program that calls; where there is none, one of our own, which tells how the block ends."""
    if status is not None:
        yield status
        return
    status = RunStatus()
    try:
        yield status
        status.done()
    except BaseException as error:
        status.fail("failed", FAILED, one_line(f"{type(error).__name__}: {error}"))
        raise
    finally:
        status.release()


@contextmanager
def no_empty_folder(path: Path) -> Iterator[None]:
    """Where the block fails, remove the folders that it has made on the way to `path` and left empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            # another process of this run may have removed it by now; what is to be told is the error above
            with suppress(OSError):
                folder.rmdir()  # which refuses one that is not empty
        raise


def _resume_hint(output_dir: Path | None) -> str:
    # checkpoints, or the tasks of a stream
    if output_dir is not None and any(any(output_dir.glob(name)) for name in ("checkpoint-*", "task-*")):
        return "continue from the last checkpoint with --resume_from_checkpoint last"
    if output_dir is not None and (output_dir / SEARCH_NAME).is_file():
        return "no checkpoint was saved; with the same flags the search goes on after its finished trainings"
    if output_dir is not None and (output_dir / RUNS_NAME).is_file():
        return f"the same command goes on after the runs that are finished, which are in {output_dir}"
    return "no checkpoint was saved"


def _show(show: Callable[[Any], Any], result: Any) -> None:
    """A reader that has gone (`| head`) does not undo what was done."""
    try:
        show(result)
        sys.stdout.flush()
    except BrokenPipeError:
        # nothing is left to be flushed at exit, which would fail again
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_program(work: Callable[[RunStatus], Any], show: Callable[[Any], Any] | None = None) -> int:
    """Run `result = work(status)`, then `show(result)` where this is the main process; returns the exit code.

    0: done. 2: bad input, one line on stderr; nothing written unless `status.start()` had been called. 3: done, but
    not pushed, which `status.not_pushed` says. 130: interrupted by the user. 143: by SIGTERM, after a checkpoint. 1:
    anything else, with its traceback.
    """
    status = RunStatus()
    try:
        interrupt.raise_again()
        result = work(status)
        status.done()
        if show is not None and is_main_process():
            _show(show, result)
        if status.not_pushed:
            if is_main_process():
                sys.stderr.write(f"{status.not_pushed}\n")
            return NOT_PUSHED
    except InputError as error:
        message = one_line(error)
        status.fail("bad input", BAD_INPUT, message)
        # before the start all processes find the same; later the one that failed is the one that knows
        if status.started or is_main_process():
            sys.stderr.write(f"error: {message}\n")
        return BAD_INPUT
    except (KeyboardInterrupt, Preempted) as error:
        exit_code = PREEMPTED if isinstance(error, Preempted) else INTERRUPTED
        message = f"interrupted: {_resume_hint(status.output_dir)}"
        status.fail("interrupted", exit_code, message)
        if is_main_process():
            sys.stderr.write(message + "\n")
        return exit_code
    except Exception as error:
        # the top of the program: recorded, shown in full, and turned into an exit code
        status.fail("failed", FAILED, one_line(f"{type(error).__name__}: {error}"))
        traceback.print_exc()
        return FAILED
    finally:
        status.release()
    return DONE
