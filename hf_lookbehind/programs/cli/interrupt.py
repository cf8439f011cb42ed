"""Ctrl-C while a program still imports its libraries, which takes seconds: one line, exit code 130.

A script imports this module before all others, and nothing is imported here that takes time.
"""

import os
import signal

_INTERRUPTED = 130
_LINE = b"interrupted: nothing had begun\n"


def end_at_once() -> None:
    """From now on Ctrl-C ends the process: an exception might be caught, or shown, by a library that is imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C is a `KeyboardInterrupt` again, if `end_at_once` was called."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, _LINE)
    os._exit(_INTERRUPTED)
