"""Private names of transformers, accelerate and TRL: all stand in one module, and the installed versions have them.

Those of DeepSpeed stand in one too; `tests/distributed/test_zero.py` holds them.
"""

import ast
import inspect
from pathlib import Path

import accelerate.state
import pytest
import transformers
from transformers import Seq2SeqTrainer, Trainer, trainer_jit_checkpoint

import hf_lookbehind
from hf_lookbehind.trainer import LookbehindSeq2SeqTrainer, private

PACKAGE = Path(hf_lookbehind.__file__).parent
HERE = PACKAGE / "trainer" / "private.py"
OF_DEEPSPEED = PACKAGE / "optim" / "partitions.py"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
# of torch, argparse, typing and os
OTHERS = ("_foreach_", "_version", "_cdata", "_C", "_data_address", "_lazy_clone", "_modules", "_buffers", "_fields",
          "_replace", "_actions", "_option_string_actions", "_format_args", "_exit", "_StoreFalseAction",
          "_IncompatibleKeys", "_disabled_torch_function_impl", "_step_supports_amp_scaling",
          "_dispatch_", "_fused_")  # fmt: skip


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def own_names(tree):
    """What a module defines, or gives to an object of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def touched(tree):
    """Private names that a module asks any object for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and is_private(a.value))


OWN = {name for tree in TREES.values() for name in own_names(tree)}
THEIRS = {name for name in {*touched(TREES[HERE]), private.AUTO_CLASS} if name not in OWN - set(private.OVERRIDDEN)}


def test_a_private_name_is_our_own_or_stands_in_the_list():
    for path, tree in TREES.items():
        names = {name for name in touched(tree) if not name.startswith(OTHERS)}
        assert path in (HERE, OF_DEEPSPEED) or names <= OWN - (THEIRS - set(private.OVERRIDDEN)), path


def test_the_methods_that_are_overridden_are_those_of_the_list():
    ours = [cls for cls in LookbehindSeq2SeqTrainer.__mro__ if cls.__module__.startswith("hf_lookbehind")]
    overridden = {name for cls in ours for name in vars(cls) if is_private(name) and hasattr(Seq2SeqTrainer, name)}
    assert overridden == set(private.OVERRIDDEN)


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_the_installed_versions_have_the_name(name):
    modules = [transformers.trainer, transformers.training_args, transformers.modeling_utils, accelerate.state,
               transformers.configuration_utils, transformers.integrations.peft]  # fmt: skip
    assert hasattr(Trainer, name) or any(name in inspect.getsource(module) for module in modules)


def test_the_mark_of_an_incomplete_checkpoint_is_transformers_own():
    assert private.INCOMPLETE_NAME in inspect.getsource(trainer_jit_checkpoint)
