"""Which files of a folder are images: the same at every depth, and what is left out is said."""

import os

import pytest
from PIL import Image as PILImage

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.data.image_files import image_folder, image_splits

ALL = {"cat": 2, "dog": 2}


def image(path, form="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8)).save(path, form)


def text(path, content="no image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images each."""
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        image(tmp_path / "data" / name)
    return tmp_path / "data"


def found(data):
    """The number of images of each class."""
    names = data.features["label"].names
    return {name: data["label"][:].count(label) for label, name in enumerate(names)}


LEFT_OUT = {
    "hidden files": (
        lambda root: [image(root / "cat/.2.png"), text(root / ".DS_Store")],
        "2 hidden ('.DS_Store', ...)",
    ),
    "a hidden folder": (lambda root: image(root / "cat/.ipynb_checkpoints/0.png"), "1 hidden"),
    "a hidden folder, deep": (lambda root: image(root / "cat/deep/.git/x/0.png"), "1 hidden"),
    "AppleDouble": (lambda root: text(root / "dog/._0.png"), "1 hidden ('dog/._0.png')"),
    "__MACOSX": (lambda root: text(root / "__MACOSX/cat/0.png"), "1 hidden ('__MACOSX/cat/0.png')"),
    "thumbnails": (lambda root: [text(root / "cat/@eaDir/0.jpg"), text(root / "Thumbs.db")], "1 hidden"),
    "a PDF": (lambda root: text(root / "cat/a.pdf"), "1 of no image format that Pillow reads here ('cat/a.pdf')"),
    "documents, films, arrays": (
        lambda root: [text(root / f"cat/a.{suffix}") for suffix in ("EPS", "ps", "mpg", "h5", "wmf", "grib", "txt")],
        "7 of no image format",
    ),
    "HEIC beside others": (lambda root: text(root / "cat/IMG_1.HEIC"), "1 of no image format"),
    "no suffix": (lambda root: image(root / "cat/photo"), "1 of no image format"),
    "an empty file": (lambda root: text(root / "cat/2.png", ""), "1 empty ('cat/2.png')"),
    "a broken link": (lambda root: (root / "cat/2.png").symlink_to("nowhere.png"), "1 linked to nothing"),
    "a link to itself": (lambda root: (root / "cat/2.png").symlink_to("2.png"), "1 linked to nothing"),
    "a pipe": (lambda root: os.mkfifo(root / "cat/2.png"), "1 no regular file"),
    "at the root": (lambda root: image(root / "0.png"), "1 beside the folders of the classes ('0.png')"),
    "a link upwards": (lambda root: link(root / "cat/up", ".."), "1 linked to a folder that is read already"),
    "a link in a circle": (lambda root: link(root / "cat/me", "."), "1 linked to a folder that is read already"),
    "a name that is not UTF-8": (
        lambda root: image(root / "cat" / os.fsdecode(b"\xff.png")),
        "1 with a name that is not UTF-8 ('cat/\\udcff.png')",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_no_image_is_left_out_and_said_in_one_line(case, root, capsys):
    make, said = LEFT_OUT[case]
    make(root)
    assert found(image_folder(str(root), "train_dir")) == ALL
    line = capsys.readouterr().err
    assert line.startswith(f"--train_dir {str(root)!r}: ") and line.count("\n") == 1 and said in line, line


def test_a_file_that_may_not_be_read_is_left_out(root, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: not path.endswith("cat/0.png"))  # root may read all
    assert found(image_folder(str(root), "train_dir")) == {"cat": 1, "dog": 2}
    assert "1 file left out: 1 not readable ('cat/0.png')" in capsys.readouterr().err


def test_only_the_main_process_says_it(root, capsys, monkeypatch):
    text(root / "cat/notes.txt")
    monkeypatch.setenv("RANK", "1")
    image_folder(str(root), "train_dir")
    assert not capsys.readouterr().err


IMAGES = {
    "a folder named like an image": lambda root: image(root / "cat/more.png/2.png"),
    "deep": lambda root: image(root / "cat/a/b/c/2.png"),
    "in capitals": lambda root: image(root / "cat/2.JPEG"),
    "WebP": lambda root: image(root / "cat/2.webp", "WEBP"),
    "a strange name": lambda root: image(root / "cat/日本 \n'ü[*].png"),
    "a linked file": lambda root: (root / "cat/2.png").symlink_to(root / "dog/0.png"),
    "a linked folder": lambda root: [image(root.parent / "more/0.png"), link(root / "cat/more", "../../more")],
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_are_found_wherever_they_lie(case, root, capsys):
    IMAGES[case](root)
    assert found(image_folder(str(root), "train_dir")) == ALL | {"cat": 3}
    assert not capsys.readouterr().err


def test_a_linked_class_is_a_class(root):
    image(root.parent / "more/0.png")
    link(root / "bird", "../more")
    assert found(image_folder(str(root), "train_dir")) == {"bird": 1, **ALL}


NO_IMAGE = {
    "an empty folder": lambda root: (root / "bird").mkdir(),
    "HEIC": lambda root: text(root / "bird/IMG_1.HEIC"),
    "nothing usable": lambda root: [image(root / "bird/.0.png"), text(root / "bird/1.png", ""), text(root / "bird/x")],
    "a link to nothing": lambda root: link(root / "bird", "nowhere"),
}


@pytest.mark.parametrize("case", NO_IMAGE)
@pytest.mark.parametrize("read", [image_folder, image_splits])
def test_a_class_without_an_image_is_named(case, read, root, capsys):
    NO_IMAGE[case](root)
    with pytest.raises(InputError, match="there is no image in 'bird'"):
        read(str(root), "train_dir")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: text(root / "README.md"), "has no folder per class"),
        (lambda root: [image(root / "train/a/0.png"), image(root / "Val/a/0.png")], "holds splits.*'Val', 'train'"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        image_folder(str(tmp_path), "train_dir")


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    def scandir(path, real=os.scandir):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(InputError, match="dog' cannot be read .Permission denied"):
        image_folder(str(root), "train_dir")


def test_a_dataset_that_is_a_folder_of_images_follows_the_same_rule(root, capsys):
    image(root / "cat/.2.png")
    assert {split: found(data) for split, data in image_splits(str(root), "dataset_name").items()} == {"train": ALL}
    for split in ("train", "val"):
        (root.parent / "splits").mkdir(exist_ok=True)
        link(root.parent / "splits" / split, root)
    splits = image_splits(str(root.parent / "splits"), "dataset_name")
    assert {split: found(data) for split, data in splits.items()} == {"train": ALL, "validation": ALL}
    assert capsys.readouterr().err.count("1 file left out") == 3


OTHERS = {
    "metadata": lambda root: text(root / "metadata.csv"),
    "metadata in a class": lambda root: text(root / "cat/metadata.jsonl"),
    "a card that says what is what": lambda root: text(root / "README.md", "---\nconfigs:\n"),
    "a saved dataset": lambda root: text(root / "dataset_dict.json"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_that_is_described_is_read_as_described(case, root):
    OTHERS[case](root)
    assert image_splits(str(root), "dataset_name") is None


@pytest.mark.parametrize("name", ["0.png", "data/train.parquet", "animals/cat/0.png"])
def test_other_layouts_are_left_to_the_library(tmp_path, name):
    image(tmp_path / name)
    assert image_splits(str(tmp_path), "dataset_name") is None
