"""The console command: `hf-lookbehind x ...` is `python -m hf_lookbehind.scripts.run_x ...`."""

import importlib
import sys
from collections.abc import Sequence

from hf_lookbehind.programs.cli import interrupt
from hf_lookbehind.programs.registry import PROGRAMS, module_name


def usage() -> str:
    width = max(map(len, PROGRAMS))
    programs = "\n".join(f"  {name:{width}}  {entry.what}" for name, entry in PROGRAMS.items())
    return f"usage: hf-lookbehind PROGRAM --flag value ...\n\nprograms:\n{programs}\n\nhf-lookbehind PROGRAM --help"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0] not in PROGRAMS:
        given = f"unknown program {argv[0]!r}" if argv else "no program given"
        print(f"error: {given}: allowed are {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    # imported here, so that a wrong name does not wait for the libraries
    interrupt.end_at_once()
    return importlib.import_module(module_name(argv[0])).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
