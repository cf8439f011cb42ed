"""A transformers that is too old is refused by name, before anything that it lacks is imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_lookbehind.trainer import OLDEST, refuse_version

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("4.57.6", "huggingface_hub below 1.0"),
        ("5.0.0", "since 5.3.0"),
        ("5.2.0", "twice"),
        ("5.5.3", "twice"),
        ("5.6.0.dev0", None),
        (OLDEST, None),
        ("5.24.0", None),
    ],
)
def test_an_old_version_is_refused_with_its_reason(version, reason):
    if reason is None:
        refuse_version(version)
        return
    with pytest.raises(ImportError, match=rf"transformers {version} is not supported .*{reason}.*{OLDEST} or later"):
        refuse_version(version)


def test_it_is_refused_where_the_trainer_is_imported_and_a_loop_of_ones_own_is_not():
    code = (
        "import transformers; transformers.__version__ = '5.5.3'\n"
        "from hf_lookbehind import Lookbehind, LookbehindConfig\n"
        "try: from hf_lookbehind import LookbehindTrainer\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers 5.5.3 is not supported")


def test_the_oldest_version_is_the_lower_bound_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={OLDEST},<6" in project["dependencies"]
