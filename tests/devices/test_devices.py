"""On a device that is no CPU: in a process of its own, which such a device belongs to from then on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import elsewhere

CASES = sorted(path.name for path in Path(__file__).parent.glob("*_cases.py"))


@pytest.mark.skipif(bool(elsewhere.why_not()), reason=str(elsewhere.why_not()))
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_on_a_device_that_is_no_cpu(chosen):
    """`pytest tests/devices/*_cases.py` runs them here; LOOKBEHIND_DEVICE=cuda in front of it, on a GPU."""
    elsewhere.built()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", chosen, *CASES]
    environment = os.environ | {"LOOKBEHIND_DEVICE": "elsewhere"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
