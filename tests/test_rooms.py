"""The layout of the package is a contract: who may import whom, and how long a module may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_lookbehind"
# From the ground up: a room imports only itself and what stands before it.
ROOMS = ["config", "tensors", "optim", "measures", "report", "hub", "trainer", "lifelong", "programs"]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "evaluate", "sklearn", "matplotlib", "numpy", "PIL"}
# Of the heavy libraries, what a room may import; a room that is not named here may import all of them.
LIBRARIES = {
    "config": set(),
    "hub": set(),
    "tensors": {"torch", "numpy"},  # numpy for its random state alone
    "optim": {"torch"},
    "measures": {"torch"},
    "report": {"matplotlib", "numpy"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(dotted: str) -> str | None:
    """The room that a dotted name lies in; None for the package's own `__init__`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else None


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a module imports anywhere, functions and TYPE_CHECKING blocks included."""
    found, parts = set(), path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = parts[: -node.level] if node.level else ()
            found |= {".".join(filter(None, [*package, node.module, alias.name])) for alias in node.names}
    return found


def test_there_is_something_to_check():
    assert {room_of(module_name(path)) for path in MODULES} >= {None, "config", "measures", "report"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_the_rooms_before_it(path):
    room = room_of(module_name(path))
    assert room is None or room in ROOMS, f"{room} is no room of this house"
    allowed = set(ROOMS if room is None else ROOMS[: ROOMS.index(room) + 1])
    ours = {name for name in imports(path) if name.split(".")[0] == "hf_lookbehind"}
    # None here is the package itself: its __init__ imports the rooms, so a room that imports it goes in a circle.
    assert {room_of(name) for name in ours} <= allowed, sorted(ours)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_its_libraries(path):
    room = room_of(module_name(path))
    libraries = {name.split(".")[0] for name in imports(path)} & HEAVY
    assert libraries <= LIBRARIES.get(room or "", HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_package_never_imports_the_scripts(path):
    assert not [name for name in imports(path) if name.startswith(("hf_lookbehind.scripts", "scripts"))]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_no_module_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    assert path.stat().st_size <= 24_000
