"""What may be read by everyone of a command line: no secrets, no paths of a machine."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath

REDACTED = "REDACTED"
# "tokenizer_name" and its kin are none
_SECRET_FLAG = re.compile(r"(^|[-_])(token|secret|password|passwd|api[-_]?key|credentials?)($|[-_])", re.IGNORECASE)
# "hf_lookbehind" is none
_TOKEN = re.compile(r"\b(hf|api_org)_(?!lookbehind\b)[A-Za-z0-9]{6,}")
# as the Hub makes them; no word of a text is so long
_WHOLE_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{30,}\b")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+@")
# directories before a name, inside of a longer value
_DIRECTORIES = re.compile(r"""(?<![\w.:/~-])(?:~[\w-]*|\.\.)?/(?:[^\s,;:"'=]*/)?""")


def redact(text: str) -> str:
    """A text without access tokens, users and passwords of URLs, and the directories of absolute paths.

    Example:
        >>> redact("/home/jane/data.csv and https://jane:pw@host/x with hf_abcdefgh")
        'data.csv and https://host/x with REDACTED'
    """
    text = _USER_OF_URL.sub("", _TOKEN.sub(REDACTED, text))
    return _DIRECTORIES.sub("", text)


def holds_token(text: str) -> bool:
    """Whether a text holds what looks like an access token of the Hub."""
    return _WHOLE_TOKEN.search(text) is not None


def redact_flags(argv: Sequence[str]) -> list[str]:
    """Words of a command line, redacted; so are the values of flags whose name speaks of a secret.

    Example:
        >>> redact_flags(["--k", "2", "--hub_token", "abc", "--token=abc", "--output_dir", "/home/jane/my runs/a"])
        ['--k', '2', '--hub_token', 'REDACTED', '--token=REDACTED', '--output_dir', 'a']
    """
    words, is_secret = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            is_secret = _SECRET_FLAG.search(flag[2:]) is not None
            words.append(flag + equals + (_redact_value(value, is_secret) if equals else ""))
        else:
            words.append(_redact_value(word, is_secret))
    return words


def command(program: str, argv: Sequence[str], leave_out: Sequence[str] = ()) -> str:
    """A command line as one can type it, a flag per line, without the flags (and their values) that are left out.

    Example:
        >>> print(command("hf-lookbehind clm", ["--k", "2", "--output_dir", "my runs"]))
        hf-lookbehind clm \\
            --k 2 \\
            --output_dir 'my runs'
    """
    flags: list[list[str]] = [[program]]
    for word in argv:
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    lines = (shlex.join(words) for words in flags[1:] if words[0].partition("=")[0] not in leave_out)
    return " \\\n    ".join([" ".join([program, *map(shlex.quote, flags[0][1:])]), *lines])


def _redact_value(value: str, is_secret: bool) -> str:
    if is_secret:
        return REDACTED
    if re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        return PureWindowsPath(value).name
    if value.startswith(("/", "~")):
        return PurePosixPath(value).name
    return redact(value)
