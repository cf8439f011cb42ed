"""What holds for all tests: what takes most of the time of a tiny training, and changes nothing of it, is left out."""

import os
from pathlib import Path

import pytest

# Torch and transformers are imported in functions: the process that hands out tests to the workers needs neither.
REHEARSING = ("hf_lookbehind.programs.program", "hf_lookbehind.scripts.run_lifelong")


def pytest_collection_finish():
    """Accelerate collects garbage in every training: what was imported is not searched each time."""
    from tests.live import set_aside_what_lives

    set_aside_what_lives()


@pytest.fixture(autouse=True, scope="module")
def imports_set_aside():
    """Nor is what earlier files of tests have imported: compilers and libraries of trainers double what there is."""
    from tests.live import set_aside_what_lives

    set_aside_what_lives()


def save_no_figure(figure, path, **_):
    Path(path).write_bytes(b"a figure")


@pytest.fixture(autouse=True, scope="session")
def abridged():
    """No program rehearses its training, or draws what it saves.

    The tests in `test_rehearsal.py` call the rehearsal themselves, and hold that it changes no bit of what follows.
    """
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        for module in REHEARSING:
            patch.setattr(f"{module}.rehearse", lambda *_: None)
        save = Figure.savefig
        patch.setattr(Figure, "savefig", save_no_figure)
        yield save


@pytest.fixture(autouse=True)
def unabridged(request, abridged, monkeypatch):
    """But in tests that are marked for it."""
    from matplotlib.figure import Figure

    from hf_lookbehind.programs.checks.rehearsal import rehearse

    if request.node.get_closest_marker("rehearsed"):
        for module in REHEARSING:
            monkeypatch.setattr(f"{module}.rehearse", rehearse)
    if request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(Figure, "savefig", abridged)


@pytest.fixture(autouse=True)
def no_launcher():
    """Children of later tests would take for a launcher's what `TrainingArguments(fsdp=...)` leaves behind."""
    before = {*os.environ}
    yield
    for name in {*os.environ} - before:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
