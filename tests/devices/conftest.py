"""The device of the cases: that of `elsewhere.cpp`, or another that `LOOKBEHIND_DEVICE` names (cuda, cpu)."""

import os

import pytest
import torch

from tests.devices import elsewhere


@pytest.fixture(scope="session")
def device():
    name = os.environ.get("LOOKBEHIND_DEVICE", "elsewhere")
    return elsewhere.register() if name == "elsewhere" else torch.device(name)
