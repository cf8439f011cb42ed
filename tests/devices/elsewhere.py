"""Builds the device of `elsewhere.cpp`, once per machine, and registers it with torch in this process."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

SOURCE = Path(__file__).with_suffix(".cpp")
INSTALLED = Path(torch.__file__).parent
# Where torch keeps extensions that it has built.
CACHE = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
# Whose interfaces the source is written for.
TORCH = (2, 11)


def why_not() -> str | None:
    """Why there cannot be such a device here, if so."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        return f"the device of the tests needs torch {'.'.join(map(str, TORCH))} or later"
    return None if _compiler() else "there is no C++ compiler to build the device of the tests with"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) if sys.platform == "linux" else None


def built() -> Path:
    """The library, built unless that was done before."""
    compiler = _compiler()
    assert compiler is not None
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {compiler}".encode()).hexdigest()[:12]
    library = CACHE / f"lookbehind_elsewhere_{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            made = library.with_suffix(".part")
            flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared"]
            flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            flags += [f"-I{INSTALLED / 'include'}"]
            libraries = [f"-L{INSTALLED / 'lib'}", "-ltorch_cpu", "-lc10"]
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made), *libraries], check=True)
            made.rename(library)
    return library


@cache
def register() -> torch.device:
    """Make the device known, for good: in a process of its own only."""
    torch.ops.load_library(str(built()))
    torch.utils.rename_privateuse1_backend("elsewhere")
    ops = torch.ops.elsewhere
    module = ModuleType("torch.elsewhere")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: ops.synchronize(),
        empty_cache=lambda: None,
        manual_seed=ops.seed,
        manual_seed_all=ops.seed,
        get_rng_state=lambda device=None: ops.rng_state(),
        set_rng_state=lambda state, device=None: ops.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module("elsewhere", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # tied weights stay tied when a module moves there, as they do between the CPU and a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    return torch.device("elsewhere", 0)


def waits() -> int:
    """How often somebody has waited for the device so far; other devices do not count."""
    if not hasattr(torch.ops.elsewhere, "waits"):
        pytest.skip("waits are counted on the tests' own device")
    return torch.ops.elsewhere.waits()
