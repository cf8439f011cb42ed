"""Every Trainer class of the installed libraries, and what becomes of it under the mixin: the table of the docs.

`python -m tests.every_trainer` writes it into docs/trainers.md.
"""

import ast
import functools
import importlib
import importlib.util
from abc import ABC
from pathlib import Path

from transformers import Trainer

from hf_lookbehind import LookbehindMixin
from hf_lookbehind.trainer.support import class_refusals, is_once
from tests import generating, libraries

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
LIBRARIES = ("transformers", "trl", "sentence_transformers")
BEGIN, END = "<!-- every trainer -->\n", "<!-- end -->"
# Those that the tests of our own Trainers hold to them.
OF_TRANSFORMERS = {"transformers.Trainer": "test_against_plain", "transformers.Seq2SeqTrainer": "test_seq2seq"}


@functools.cache
def every_trainer():
    """All public classes that derive from `Trainer`, by the file that defines them, sorted by their names.

    Their names are read from the sources: only modules that have such a class are imported.
    """
    found = {}
    for library in LIBRARIES:
        root = Path(importlib.util.find_spec(library).origin).parent
        for path in sorted(root.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "Trainer" not in text or path.name.startswith("dummy_"):
                continue
            module = ".".join((library, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            for name in _trainers(ast.parse(text)):
                cls = getattr(importlib.import_module(module), name)
                # abstract ones are for the library itself
                if issubclass(cls, Trainer) and ABC not in cls.__bases__:
                    found[name_of(cls)] = cls
    return dict(sorted(found.items(), key=lambda item: (LIBRARIES.index(item[0].partition(".")[0]), item[0])))


def _trainers(tree):
    """The public classes of a module that are called `Trainer`, or have a base that looks like one."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if node.name == "Trainer" or any(ast.unparse(base).endswith("Trainer") for base in node.bases):
                yield node.name


def name_of(cls):
    """As people import it: `trl.GRPOTrainer`, `trl.experimental.gmpo.GMPOTrainer`."""
    parts = cls.__module__.split(".")
    for n in range(1, len(parts) + 1):
        package = ".".join(parts[:n])
        if getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    raise AssertionError(cls)


def tested():
    """The classes whose trainings the tests hold to their own, by the test that does."""
    of_libraries = {case.trainer: "test_libraries" for case in libraries.CASES.values()}
    return OF_TRANSFORMERS | of_libraries | {case.trainer: "test_rollouts" for case in generating.CASES.values()}


def verdict(name, cls):
    """exact, not tried, or refused and why."""
    mixed = type("Mixed", (LookbehindMixin, cls), {})
    refusal = next(class_refusals(mixed, LookbehindMixin), None)
    if refusal is not None:
        return f"refused: {refusal.partition(' is not supported: ')[2]}"
    if name not in tested():
        return "not tried"
    return "exact; prepares once" if any(map(is_once, cls.__mro__)) else "exact"


@functools.cache
def table():
    rows = ["| Trainer | under the mixin | held by |", "|:--|:--|:--|"]
    for name, cls in every_trainer().items():
        test = tested().get(name)
        rows.append(f"| `{name}` | {verdict(name, cls)} | {f'`tests/trainer/{test}.py`' if test else ''} |")
    return "\n".join(rows) + "\n"


def documented():
    """The table as the page has it."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(BEGIN + documented(), BEGIN + table()), encoding="utf-8")
