"""Files of settings, YAML or JSON: what they say as it would stand on the command line."""

import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ...config import InputError
from .running import one_line

# Of the files that come with the programs, those of `accelerate launch` are no settings of a program.
RECIPE_FOLDERS = ("", "papers")


class _Loader(yaml.SafeLoader):
    """Of values inside of values: 1e-4 is a number, as everywhere but in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file; a name that is not here is looked up among those that come with the programs.

    That is a bare name, `sam.yaml`, or one in their folder of papers, `papers/sam.yaml`.

    A value is a text, as it is written: to YAML `no` is a truth value, 1.10 is 1.1, and 010 is eight. It is a list of
    such texts where there are several, a dict with typed values, or None.

    Raises:
        InputError: the file cannot be read, holds no settings, or one of them twice; no value is repeated, which might
            be a secret.
    """
    if not path.is_file():
        path = _recipe(path)
    try:
        text = path.read_text(encoding="utf-8")
        return _of_json(text) if path.suffix == ".json" else _of_yaml(text)
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"{path} cannot be read: {one_line(error.problem)}{line}") from error
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def _recipe(name: Path) -> Path:
    """The file of this name that comes with the programs.

    Raises:
        InputError: there is none.
    """
    parent = os.fspath(name.parent) if name.name != os.fspath(name) else ""
    if parent not in RECIPE_FOLDERS:
        raise InputError(f"{name}: there is no such file of settings")
    recipes = Path(str(resources.files("hf_lookbehind.scripts"))) / "recipes"
    found = [recipes / folder / name.name for folder in ([parent] if parent else RECIPE_FOLDERS)]
    for path in found:
        if path.is_file():
            return path
    raise InputError(f"{name}: there is no such file of settings, neither here nor in {recipes}")


def _of_json(text: str) -> dict[str, Any]:
    settings = json.loads(text, object_pairs_hook=_once)
    _check_kind(settings, isinstance(settings, dict))
    return {name: _as_written(value) for name, value in settings.items()}


def _as_written(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(each) for each in value]
    return value if value is None or isinstance(value, str | dict) else json.dumps(value)


def _of_yaml(text: str) -> dict[str, Any]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        is_mapping = isinstance(root, yaml.MappingNode)
        _check_kind(loader.construct_document(root), is_mapping)
        assert is_mapping
        _once([(key.value, None) for key, _ in root.value])
        loader.flatten_mapping(root)
        return {key.value: _value(loader, node) for key, node in root.value}
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, each) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        return loader.construct_document(node)
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _check_kind(settings: Any, is_mapping: bool) -> None:
    if not is_mapping:
        raise InputError(f"must hold settings as 'name: value', not a {type(settings).__name__}")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs.

    Raises:
        InputError: a name stands there twice.
    """
    found = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"holds {name!r} twice")
        found[name] = value
    return found
