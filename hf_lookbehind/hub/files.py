"""Which files of a folder are a model: those that can be shared, and whether they are whole."""

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import CONFIG_NAME as LOOKBEHIND_CONFIG
from ..config import InputError

CARD_NAME = "README.md"
CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME = "model.safetensors", "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
SHARDS = "model-*-of-*.safetensors"
WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, SHARDS)

NEEDS_BASE = "adapters need a base model on the Hub, or nobody else could load them"
# All that is ever uploaded. What is not listed stays: states of the optimizer, pickles, logs, environments, paths.
SHARED = (
    # the model
    *WEIGHTS, CONFIG_NAME, "generation_config.json", ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME,
    # its tokenizer or processor
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm",
    "target.spm", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    # of sentence-transformers
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    # how it was trained, and what came out
    LOOKBEHIND_CONFIG, CARD_NAME, "*_results.json", "accuracy_matrix.json", "rho_search.json", "flatness.json",
    "*.png", "figures/*.png",
    "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*",
)  # fmt: skip


def files_to_push(folder: str | Path) -> list[str]:
    """The files of a trained model that can be shared: names in the folder, with slashes, sorted.

    Hidden files, and links that lead out of the folder, are none of them.

    Args:
        folder: with a saved model or saved adapters.

    Raises:
        InputError: it is no folder, it contains the working directory, it holds no model, or one that was cut while
            being written.
    """
    root = Path(folder).expanduser()
    check_folder_to_push(root)
    if not root.is_dir():
        raise InputError(f"{str(folder)!r} cannot be pushed: there is no such folder")
    names = sorted(_shared(root))
    problem = _what_is_missing(root, set(names))
    if problem is not None:
        raise InputError(f"{str(folder)!r} cannot be pushed: {problem}")
    return names


def check_folder_to_push(folder: str | Path) -> None:
    """Refuse one that contains the working directory, where other work lies.

    Raises:
        InputError
    """
    root = Path(folder).expanduser().resolve()
    if Path.cwd().resolve().is_relative_to(root):
        raise InputError(
            f"{str(folder)!r} cannot be pushed: it contains the working directory; a model needs a folder of its own"
        )


def is_local(base_model: str) -> bool:
    """Whether the base model of adapters is a folder of this machine, which is of no use to anyone else."""
    return os.path.exists(os.path.expanduser(base_model)) or base_model.startswith((".", "~", os.sep))


def _shared(root: Path) -> Iterator[str]:
    for path in (*root.iterdir(), *root.glob("*/*")):
        name = path.relative_to(root).as_posix()
        # fnmatch lets * match slashes and leading dots
        is_listed = any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in SHARED)
        if is_listed and not name.startswith(".") and path.is_file() and _is_inside(path, root):
            yield name


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _what_is_missing(root: Path, names: set[str]) -> str | None:
    """Why this is no whole model, or None."""
    shards = {name for name in names if fnmatchcase(name, SHARDS)}
    if not names & {WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, INDEX_NAME} and not shards:
        return f"it holds no model: no {WEIGHTS_NAME}, {INDEX_NAME} or {ADAPTER_WEIGHTS_NAME}"
    if shards and not names & {WEIGHTS_NAME, INDEX_NAME}:
        return f"it has parts of a model, but no {INDEX_NAME}: it was cut while being written"
    if not names & {CONFIG_NAME, ADAPTER_CONFIG_NAME, "modules.json"}:
        return f"it has weights, but neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}"
    for name in sorted(names):
        if name.endswith(".json"):
            try:
                content = json.loads((root / name).read_text(encoding="utf-8"))
            except ValueError:
                return f"its {name} is no JSON: it was cut while being written"
            if name == ADAPTER_CONFIG_NAME and is_local(content.get("base_model_name_or_path") or ""):
                return f"{NEEDS_BASE}, not {content['base_model_name_or_path']!r} as its {name} says"
            if name == INDEX_NAME:
                missing = sorted(set(content["weight_map"].values()) - names)
                if missing:
                    return f"its {INDEX_NAME} names {missing[0]}, which is not there"
        elif name.endswith(".safetensors"):
            try:
                with safe_open(root / name, framework="np"):
                    pass
            except SafetensorError as error:
                return f"its {name} is damaged ({error}): it was cut while being written"
    return None
