"""Local files are read as they are now, whatever is kept of what they were."""

import os
import shutil
import zipfile

import pytest
from datasets import Dataset

from hf_lookbehind.programs.cli.arguments import DataArguments
from hf_lookbehind.programs.data import sources
from hf_lookbehind.programs.data.caching import state_of
from hf_lookbehind.programs.data.texts import TextDataArguments, encode_texts, load_texts
from tests.caches import set_caches

STAMP = (315532800, 315532800)
KINDS = ("csv", "tsv", "json", "jsonl", "parquet", "txt")


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def write(path, texts):
    """A table of texts of one size, with a time stamp that says nothing."""
    rows = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix in (".csv", ".tsv"):
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path)
    os.utime(path, STAMP)


class Texts(TextDataArguments):
    suffixes = tuple(f".{kind}" for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changed_under_one_time_stamp_is_read_again(tmp_path, kind):
    found = []
    for texts in (["one", "two"], ["six", "ten"]):
        write(tmp_path / f"data.{kind}", texts)
        found.append(" ".join(load_texts(Texts(train_file=[str(tmp_path / f"data.{kind}")]))["train"]["text"][:]))
    assert found[0].split() == ["one", "two"] and found[1].split() == ["six", "ten"]


def zipped(path, texts):
    write(path.with_name("data.csv"), texts)
    with zipfile.ZipFile(path, "w") as file:
        file.write(path.with_name("data.csv"), "data.csv")
    path.with_name("data.csv").unlink()
    os.utime(path, STAMP)


def linked(path, texts):
    write(path.parent.with_name("elsewhere") / "train.csv", texts)
    if not path.parent.exists():
        path.parent.symlink_to(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "zip", "below", "link"])
def test_a_folder_whose_files_changed_under_one_time_stamp_is_read_again(tmp_path, kind):
    folder, found = tmp_path / "data", []
    folder.mkdir()
    for texts in (["one", "two"], ["six", "ten"]):
        if kind == "zip":
            zipped(folder / "train.zip", texts)
        elif kind == "link":
            linked(folder / "sub" / "train.csv", texts)
        else:
            write(folder / "sub" / "train.csv" if kind == "below" else folder / f"train.{kind}", texts)
        found.append(sources.load_splits(DataArguments(dataset_name=str(folder)), built_in={})["train"]["text"][:])
    assert found == [["one", "two"], ["six", "ten"]]


@pytest.mark.parametrize("of_splits", [False, True])
def test_what_was_made_of_a_saved_dataset_is_made_again_when_its_files_changed(tmp_path, of_splits):
    """Also where they have kept the fingerprint, as two datasets do that were made of one path."""
    folder, found = tmp_path / "data", []
    part = folder / "train" if of_splits else folder
    for texts in (["one", "two"], ["seven", "eleven"], None):
        if texts is not None:
            source = Dataset.from_dict({"text": texts}).select_columns(["text"], new_fingerprint="0123456789abcdef")
            source.save_to_disk(tmp_path / "new")
            shutil.copytree(tmp_path / "new", part, dirs_exist_ok=True)
        if of_splits:
            (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
        rows = sources.take_split(
            sources.load_splits(DataArguments(dataset_name=str(folder)), built_in={}), "train", ""
        )
        found.append(encode_texts(rows, ["text"], lengths)["length"][:])
    assert found == [[3, 3], [5, 6], [5, 6]]
    assert len(list(part.glob("cache-*.arrow"))) == 2  # what has not changed is not made again


def lengths(batch):
    return {"length": [len(text) for text in batch["text"]]}


def test_a_state_ends_where_links_go_in_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    before = state_of(tmp_path)
    assert before == state_of(tmp_path)
    write(tmp_path / "a" / "x.csv", ["one"])
    assert before != state_of(tmp_path)
