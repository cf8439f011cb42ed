"""What a model's own files name of others: modules of sentence-transformers, shards, adapters, images of the card."""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from . import file_names as names

# an image in markdown, or in HTML
_IMAGE = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]+src=["']([^"']+)""", re.IGNORECASE)


def read_json(path: Path) -> Any:
    """What a file holds; None for one that is not there, or no JSON, which `what_is_missing` names."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def module_folders(root: Path) -> list[str]:
    """The folders of all modules of sentence-transformers, those that a router names included; the root is none."""
    listed = read_json(root / names.MODULES_NAME)
    found = [module["path"] for module in listed if module["path"]] if is_list_of_modules(listed) else []
    return [name for folder in ("", *found) for name in (folder, *_routed(root, folder)) if is_inside(name)]


def _routed(root: Path, folder: str) -> Iterator[str]:
    """What the router in a folder names, if there is one; a router may hold others."""
    for config in (names.ROUTER_NAME, names.CONFIG_NAME):  # the second is of older versions
        content = read_json(root / folder / config)
        if isinstance(content, dict) and isinstance(content.get("types"), dict) and "structure" in content:
            for module in content["types"]:
                name = posixpath.join(folder, module)
                yield name
                yield from _routed(root, name)


def is_list_of_modules(content: Any) -> bool:
    """Whether this is what `modules.json` holds."""
    return isinstance(content, list) and all(isinstance(m, dict) and isinstance(m.get("path"), str) for m in content)


def is_inside(name: str) -> bool:
    """Whether a relative path, with slashes, leads to something within the folder that it starts from."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def index_shards(root: Path) -> list[str]:
    """The files that the index of the weights names: they may have any name."""
    index = read_json(root / names.INDEX_NAME)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    found = {name for name in shards.values() if isinstance(name, str)} if isinstance(shards, dict) else set()
    return sorted(name for name in found if is_inside(name) and name.endswith(".safetensors"))


def adapter_folders(root: Path) -> list[str]:
    """Folders that hold adapters and nothing else, where those of PEFT that are not called "default" are saved.

    Beside the weights of a whole model they are none of it.
    """
    if any((root / name).exists() for name in (names.WEIGHTS_NAME, names.INDEX_NAME)):
        return []
    folders = (path.parent for path in root.glob(f"*/{names.ADAPTER_CONFIG_NAME}"))
    return sorted(folder.name for folder in folders if _holds_adapters_alone(folder))


def _holds_adapters_alone(folder: Path) -> bool:
    return {path.name for path in folder.iterdir() if path.name != names.CARD_NAME} == set(names.ADAPTER)


def images_of_card(root: Path) -> list[str]:
    """Images in the folder that the card shows."""
    card = root / names.CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    shown = {posixpath.normpath(unquote(one or other)) for one, other in _IMAGE.findall(text)}
    return sorted(
        name for name in shown if is_inside(name) and names.is_one_of(posixpath.basename(name), names.IMAGES)
    )
