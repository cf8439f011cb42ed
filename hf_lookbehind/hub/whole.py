"""Whether a folder holds one whole model, which others can load from the files that are shared."""

import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import file_names as names
from .file_names import is_one_of
from .modules import is_inside, is_list_of_modules, module_folders, read_json
from .redact import holds_token

NEEDS_BASE = "adapters need a base model on the Hub, or nobody else could load them"
CUT = "it was cut while being written"
# Longer texts are vocabularies.
TEXT_BYTES = 1_000_000
SENTENCE_TRANSFORMERS_NAME = "config_sentence_transformers.json"
WEIGHTS_IN_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin")


def what_is_missing(root: Path, shared: Sequence[str], left_out: Mapping[str, str]) -> str | None:
    """Why this is no whole model, or None.

    Args:
        root: the folder.
        shared: names of the files in it that can be shared.
        left_out: names of the others, with the reason why they are not.
    """
    folder = _Folder(root, set(shared), left_out)
    checks = (
        folder.what_cannot_be_spared, folder.contents, folder.no_model, folder.no_config, folder.two_models,
        folder.modules, folder.tokenizer,
    )  # fmt: skip
    return next((problem for check in checks for problem in check()), None)


def is_local(base_model: str) -> bool:
    """Whether the base model of adapters is a folder of this machine, which is of no use to anyone else."""
    is_path = base_model.startswith((".", "~", os.sep)) or re.match(r"[A-Za-z]:|.*\\", base_model) is not None
    return is_path or os.path.exists(os.path.expanduser(base_model))


def problem_of_base(base_model: str | None) -> str | None:
    """Why nobody else could load adapters of this base model, or None."""
    return f"{NEEDS_BASE}, not {base_model!r}" if not base_model or is_local(base_model) else None


class _Folder:
    """The checks: each gives what it finds wrong, in words that go on from "cannot be pushed: "."""

    def __init__(self, root: Path, shared: set[str], left_out: Mapping[str, str]) -> None:
        self.root, self.shared, self.left_out = root, shared, left_out

    def what_cannot_be_spared(self) -> Iterator[str]:
        """Of what is left out."""
        modules, code = module_folders(self.root), self._own_code()
        for name, why in self.left_out.items():
            folder, base = posixpath.split(name)
            is_of_module = any(f"{folder}/".startswith(f"{module}/") for module in modules)
            is_of_model = is_one_of(name, names.SHARED) and not is_one_of(name, names.RESULTS)
            is_weights = is_one_of(base, WEIGHTS_IN_PICKLES)
            if is_weights and self._weights_in(folder):
                continue
            if is_of_module or is_of_model or is_weights or name in code:
                yield f"its {name} is {why}, and nobody could load the model without it"

    def no_model(self) -> Iterator[str]:
        if not self._weights_in("") and any(is_one_of(name, [names.SHARDS]) for name in self.left_out):
            yield f"it has parts of a model, but no {names.INDEX_NAME}: {CUT}"
        if not any(name.endswith(".safetensors") for name in self.shared):
            yield f"it holds no model: no {names.WEIGHTS_NAME}, {names.INDEX_NAME} or {names.ADAPTER_WEIGHTS_NAME}"

    def no_config(self) -> Iterator[str]:
        configs = {names.CONFIG_NAME, names.ADAPTER_CONFIG_NAME, names.MODULES_NAME}
        if self._weights_in("") and not configs & self.shared:
            yield f"it has weights, but neither {names.CONFIG_NAME} nor {names.ADAPTER_CONFIG_NAME}"

    def two_models(self) -> Iterator[str]:
        """Where one of two would be loaded, and perhaps not the one that was trained."""
        for folder in sorted({posixpath.dirname(name) for name in self.shared}):
            forms = self._weights_in(folder) | ({names.ADAPTER_CONFIG_NAME} & self._names_in(folder))
            whole = [name for name in (names.WEIGHTS_NAME, names.INDEX_NAME) if name in forms]
            adapters = [name for name in names.ADAPTER if name in forms]
            found = [posixpath.join(folder, name) for name in (*whole, *adapters[:1])]
            if len(found) > 1:
                yield f"it holds {' and '.join(found)}, of which one is of another training: remove that"

    def modules(self) -> Iterator[str]:
        """Of sentence-transformers."""
        listed = read_json(self.root / names.MODULES_NAME)
        if names.MODULES_NAME not in self.shared:
            if SENTENCE_TRANSFORMERS_NAME in self.shared:  # which is written first
                yield f"it has {SENTENCE_TRANSFORMERS_NAME}, but no {names.MODULES_NAME}: {CUT}"
        elif listed is not None and not is_list_of_modules(listed):
            yield f"its {names.MODULES_NAME} is no list of modules, each with a path"
        else:
            named = [module["path"] for module in listed or () if module["path"]]
            yield from self._modules_not_there([*named, *module_folders(self.root)])

    def _modules_not_there(self, folders: Iterable[str]) -> Iterator[str]:
        for folder in folders:
            if not is_inside(folder):
                yield f"its {names.MODULES_NAME} names {folder!r}, which is no folder in it"
            # which some versions leave empty, and Git does not keep
            elif not any(name.startswith(f"{folder}/") for name in self.shared) and not folder.endswith("_Normalize"):
                yield f"its {names.MODULES_NAME}, or a router, names {folder}, which is empty or not there"

    def tokenizer(self) -> Iterator[str]:
        config = read_json(self.root / names.TOKENIZER_CONFIG_NAME)
        needs_none = not isinstance(config, dict) or config.get("tokenizer_class") in names.WITHOUT_VOCABULARY
        if needs_none or any(is_one_of(name, names.VOCABULARIES) for name in self.shared):
            return
        for name, why in self.left_out.items():
            if "/" not in name:
                yield f"its tokenizer has no vocabulary under a known name; {name!r} may be it, {why}"

    def contents(self) -> Iterator[str]:
        for name in sorted(self.shared):
            if name.endswith(".json"):
                yield from self._json(name)
            elif name.endswith(".safetensors"):
                yield from self._safetensors(name)
            if self._is_short_text(name) and holds_token((self.root / name).read_text("utf-8", "replace")):
                yield f"its {name} holds what looks like an access token of the Hub"

    def _json(self, name: str) -> Iterator[str]:
        folder, base = posixpath.split(name)
        try:
            content = json.loads((self.root / name).read_text(encoding="utf-8"))
        except ValueError:
            yield f"its {name} is no JSON: {CUT}"
            return
        if base in (names.INDEX_NAME, names.ADAPTER_CONFIG_NAME) and not isinstance(content, dict):
            yield f"its {name} is a {type(content).__name__}, where an object is needed"
        elif base == names.ADAPTER_CONFIG_NAME:
            problem = problem_of_base(content.get("base_model_name_or_path"))
            yield from [f"{problem} as its {name} says"] if problem else []
        elif base == names.INDEX_NAME:
            shards = content.get("weight_map")
            if not isinstance(shards, dict) or not shards:
                yield f"its {name} names no weights: {CUT}"
            else:
                missing = sorted(set(map(str, shards.values())) - self._names_in(folder))
                yield from [f"its {name} names {missing[0]}, which is not there"] if missing else []

    def _safetensors(self, name: str) -> Iterator[str]:
        try:
            with safe_open(self.root / name, framework="np"):
                pass
        except SafetensorError as error:
            yield f"its {name} is damaged ({error}): {CUT}"

    def _is_short_text(self, name: str) -> bool:
        is_text = is_one_of(posixpath.basename(name), ("*.json", "*.md", "*.jinja", "*.txt"))
        return is_text and (self.root / name).stat().st_size <= TEXT_BYTES

    def _names_in(self, folder: str) -> set[str]:
        start = f"{folder}/" if folder else ""
        return {name.removeprefix(start) for name in self.shared if name.startswith(start)}

    def _weights_in(self, folder: str) -> set[str]:
        return self._names_in(folder) & {names.WEIGHTS_NAME, names.INDEX_NAME, names.ADAPTER_WEIGHTS_NAME}

    def _own_code(self) -> set[str]:
        """Files of code that the model, its tokenizer or its processor is made by: those that `auto_map` names."""
        configs = [name for name in self.shared if fnmatchcase(name, "*config.json")]
        text = "".join((self.root / name).read_text("utf-8", "replace") for name in configs)
        return {name for name in self.left_out if name.endswith(".py") and f'"{Path(name).stem}.' in text}
