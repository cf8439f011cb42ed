"""The program of `run_lifelong.py`, for texts.

    hf-lookbehind lifelong-text lifelong_text.yaml --replay balanced --output_dir runs/lifelong-text

Examples of its own, and what the flags mean, are those of `run_lifelong.py`.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass

from hf_lookbehind.scripts import run_text_classification
from hf_lookbehind.scripts.run_lifelong import StreamArguments, StreamProgram, parser_of
from hf_lookbehind.scripts.run_text_classification import TextClassificationDataArguments, TextModelArguments


@dataclass
class TextStreamArguments(StreamArguments, TextClassificationDataArguments):
    pass


PROGRAM = StreamProgram(
    "lifelong-text", parser_of(TextStreamArguments, TextModelArguments), run_text_classification.prepare
)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
