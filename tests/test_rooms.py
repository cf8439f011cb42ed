"""The layout of the package is a contract: who may import whom, what is called how, and how long a module may be."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_lookbehind"
# From the ground up: a room imports only itself and what stands before it. The same holds in programs/.
ROOMS = [
    "config",
    "tensors",
    "optim",
    "measures",
    "report",
    "hub",
    "trainer",
    "lightning",
    "lifelong",
    "programs",
    "compare",
]
PROGRAMS = "registry footprint cli evaluation models data task sft streams tuning parts card checks program".split()
HEAVY = {"torch", "transformers", "accelerate", "datasets", "evaluate", "sklearn", "matplotlib", "numpy", "PIL"}
# Of the heavy libraries, what a room may import; a room that is not named here may import all of them.
LIBRARIES = {
    "config": set(),
    "hub": set(),
    "tensors": {"torch", "numpy"},  # numpy for its random state alone
    "optim": {"torch"},
    "measures": {"torch"},
    "lightning": set(),
    "report": {"matplotlib", "numpy"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# Names that several modules share, and why.
SHARED = {
    "__init__": "a folder's",
    "__main__": "a folder's",
    "card": "each room's own part of the model card",
    "push": "the program of the room's function",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(dotted: str, depth: int = 1) -> str | None:
    """The room that a dotted name lies in; None for the package's own `__init__`."""
    parts = dotted.split(".")
    return parts[depth] if len(parts) > depth and parts[depth] != "__init__" else None


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
    assert {room_of(module_name(path)) for path in MODULES} == {None, *ROOMS}
    assert {room_of(module_name(path), 2) for path in MODULES if path.is_relative_to(PACKAGE / "programs")} == {
        None,
        *PROGRAMS,
    }


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_the_rooms_before_it(path):
    room = room_of(module_name(path))
    assert room is None or room in ROOMS, f"{room} is no room of this house"
    allowed = set(ROOMS if room is None else ROOMS[: ROOMS.index(room) + 1])
    ours = {name for name in imports(path) if name.split(".")[0] == "hf_lookbehind"}
    # None here is the package itself: its __init__ imports the rooms, so a room that imports it goes in a circle.
    assert {room_of(name) for name in ours} <= allowed, sorted(ours)


@pytest.mark.parametrize("path", sorted((PACKAGE / "programs").rglob("*.py")), ids=module_name)
def test_in_programs_imports_point_one_way_too(path):
    here = room_of(module_name(path), 2)
    if here is None:
        return
    allowed = set(PROGRAMS[: PROGRAMS.index(here) + 1])
    ours = {name for name in imports(path) if name.startswith("hf_lookbehind.programs.")}
    assert {room_of(name, 2) for name in ours} <= allowed, sorted(ours)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_its_libraries(path):
    room = room_of(module_name(path))
    libraries = {name.split(".")[0] for name in imports(path)} & HEAVY
    assert libraries <= LIBRARIES.get(room or "", HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_package_never_imports_the_scripts(path):
    assert not [name for name in imports(path) if name.startswith(("hf_lookbehind.scripts", "scripts"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_what_users_get_never_imports_the_tools_of_the_maintainers(path):
    is_tool = path.parent.name in ("benchmark", "demo", "gallery", "gpu_check", "studies")
    tools = tuple(f"hf_lookbehind.scripts.{name}" for name in ("benchmark", "demo", "gallery", "gpu_check", "studies"))
    assert is_tool or not [name for name in imports(path) if name.startswith(tools)]


def test_how_tensors_are_held_is_asked_in_one_place():
    asking = [path for path in MODULES if any("DTensor" in name or "FSDPModule" in name for name in imports(path))]
    assert asking == [PACKAGE / "tensors" / "processes.py"]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_no_module_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    assert path.stat().st_size <= 24_000


def test_the_iteration_is_alone_in_the_mixin():
    assert len((PACKAGE / "trainer" / "mixin.py").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES + SCRIPTS}), ids=str)
def test_a_folder_can_be_looked_over(folder):
    """At most twenty files; a third one with the same first word makes a folder."""
    files = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")]
    assert len(files) <= 20
    words = Counter(name.removeprefix("_").split("_")[0] for name in files if "_" in name.removeprefix("_"))
    words.pop("run", None)  # the programs that train
    assert not [word for word, count in words.items() if count > 2]


def test_no_two_modules_share_a_name_without_reason():
    found = defaultdict(list)
    for path in MODULES + SCRIPTS:
        found[path.stem].append(module_name(path))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1 and name not in SHARED}


def test_no_two_public_classes_share_a_name():
    found = defaultdict(list)
    for path in MODULES + SCRIPTS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module_name(path))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}
