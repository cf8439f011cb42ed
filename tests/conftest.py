"""What holds for all tests."""

import pytest


@pytest.fixture(autouse=True)
def no_rehearsal(request, monkeypatch):
    """A program's rehearsal doubles the time of a tiny training: only tests that are marked for it have it.

    Those of `test_rehearsal.py` call it themselves, and hold that it changes no bit of what follows.
    """
    if request.node.get_closest_marker("rehearsed") is None:
        for module in ("hf_lookbehind.programs.program", "hf_lookbehind.scripts.run_lifelong"):
            monkeypatch.setattr(f"{module}.rehearse", lambda *_: None)
