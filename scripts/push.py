"""Push a trained model to the Hub: what a program says when the Hub could not be reached at the end of the training.

    hf-lookbehind push runs/reviews user/reviews
    hf-lookbehind push runs/reviews user/reviews --private --revision v2

Uploaded are weights, config, tokenizer or processor, the modules of sentence-transformers, card, the images that it
shows, results and figures, and nothing else: no checkpoints, no training_args.bin, no logs, no pickles, no code; what
else is left out, one line names. A folder of which nobody could load the model is refused. A repository that does not
exist is created. The token is that of HF_TOKEN or of the stored login (`hf auth login`).
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from hf_lookbehind.hub import NotPushedError, push_folder
from hf_lookbehind.hub.push import check_deadline
from hf_lookbehind.programs.cli.lock import hold
from hf_lookbehind.programs.cli.running import NOT_PUSHED, STATUS_NAME, OneLineParser, RunStatus, run_program


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__,
        usage="%(prog)s OUTPUT_DIR USER/REPO [--flag value ...]",
    )
    add = parser.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="Folder of a trained model.")
    add("repo_id", metavar="USER/REPO", help="Repository on the Hub; without USER/, of the token's own user.")
    add("--private", action="store_true", default=None, help="Make a new repository private.")
    add("--revision", help="Branch; one that does not exist is created. Default: main.")
    add("--commit_message", default="Upload model", help="Default: 'Upload model'.")
    add("--deadline", type=float, help="Seconds to give up after. Default: 300, and one more for each megabyte.")
    return parser


def push(argv: Sequence[str] | None, status: RunStatus) -> str:
    """The URL of the commit, or "" where `status.not_pushed` says why there is none.

    Raises:
        InputError: the folder cannot be pushed, or a flag's value is not allowed.
    """
    args = make_parser().parse_args(argv)
    check_deadline("--deadline", args.deadline)
    folder = Path(args.output_dir).expanduser()
    try:
        # a run that goes on there, or starts, would change what is uploaded
        with hold(folder, "OUTPUT_DIR") if _may_hold_a_run(folder) else nullcontext():
            url = push_folder(
                args.output_dir,
                args.repo_id,
                private=args.private,
                revision=args.revision,
                commit_message=args.commit_message,
                deadline=args.deadline,
            )
            earlier = RunStatus(folder)
            if earlier.exit_code() == NOT_PUSHED:
                earlier.started = True
                earlier.done()
    except NotPushedError as error:
        status.not_pushed = f"not pushed: {error}"
        return ""
    return url


def _may_hold_a_run(folder: Path) -> bool:
    return (folder / STATUS_NAME).is_file() and os.access(folder, os.W_OK)


def _show(url: str) -> None:
    sys.stdout.write(f"pushed: {url}\n" if url else "")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(lambda status: push(argv, status), _show)


if __name__ == "__main__":
    sys.exit(main())
