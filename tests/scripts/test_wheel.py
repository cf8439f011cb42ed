"""What `pip install` brings: the console command and every program, outside of the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from hf_lookbehind.scripts.__main__ import PROGRAMS

ROOT = Path(__file__).parents[2]
# Every program helps, and one trains with a recipe that comes along: in one process, for their imports take longest.
PROGRAMS_RUN = """
import contextlib, io, sys
from hf_lookbehind.scripts import __main__ as command

for program in command.PROGRAMS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command.main([program, "--help"])
    assert f"hf-lookbehind {program}" in text.getvalue(), program
    assert sys.modules[command.module_name(program)].__file__.startswith(sys.prefix)
print("every program helps")
sys.exit(command.main(["image-classification", "vit_digits.yaml", *sys.argv[1:]]))
"""

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("hf_lookbehind", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    """The scripts folder of a new environment in which the wheel is installed, beside the dependencies."""
    folder = wheel.parent
    venv.create(folder / "venv", with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    # the dependencies, but not the clone: a .pth file that is found over another is not read
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(Path(paths["scripts"]) / "python")
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return Path(paths["scripts"])


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_it_holds_the_package_and_the_users_programs_and_no_tool_of_the_maintainers(wheel):
    package = ROOT / "hf_lookbehind"
    expected = {*package.rglob("*.py"), *package.rglob("*.md"), package / "py.typed"}
    expected |= {*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts" / "recipes").rglob("*.yaml")}
    names = {path.relative_to(ROOT).as_posix() for path in expected}
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" not in name}
    assert texts.keys() == {name.replace("scripts/", "hf_lookbehind/scripts/") for name in names}
    for word in ("apt-get", "fcntl", "unittest"):
        assert [name for name, text in texts.items() if word in text] == []


def test_the_console_command_lists_the_programs(installed, tmp_path):
    done = run(installed / "hf-lookbehind", "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(program in done.stdout for program in PROGRAMS)
    assert str(ROOT) not in done.stdout + done.stderr


def test_every_program_helps_and_a_recipe_trains(installed, tmp_path):
    flags = ["--max_train_samples", "32", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    flags += ["--load_best_model_at_end", "false", "--output_dir", "out"]
    done = run(installed / "python", "-c", PROGRAMS_RUN, *flags, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("every program helps\n"), done.stderr
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["train_gradient_passes"] == 6
