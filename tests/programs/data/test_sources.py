"""Splits, subsets, labels and label noise."""

from functools import partial

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.cli.arguments import DataArguments
from hf_lookbehind.programs.data import labels as label_tools
from hf_lookbehind.programs.data import sources


def labelled(labels, feature=None):
    features = Features({"x": Value("int64"), "label": feature or ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"x": list(range(len(labels))), "label": labels}, features=features)


SPLITS = {"train": labelled([0, 1] * 50), "test": labelled([2] * 20)}
STRATA = partial(label_tools.classes_that_occur, column="label")


@pytest.mark.parametrize(
    "spec, rows",
    [
        ("train", list(range(100))),
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [98, 99]),
        ("train[10%:12%]", [10, 11]),
        ("train[:2]+train[5:6]", [0, 1, 5]),
        ("train[:1]+test[:2]", [0, 0, 1]),
    ],
)
def test_slices_choose_rows(spec, rows):
    assert sources.take_split(SPLITS, spec, "train_split").column("x") == rows


@pytest.mark.parametrize(
    "spec, message",
    [("dev", "Unknown split"), ("train[:x]", "Unrecognized instruction"), ("train[:0]", "is empty")],
)
def test_bad_slices_are_refused(spec, message):
    with pytest.raises(InputError, match=f"--train_split .*{message}"):
        sources.take_split(SPLITS, spec, "train_split")


@pytest.mark.parametrize(
    "flags, sizes",
    [
        ({}, {"train": 84, "validation": 16}),
        ({"train_val_split": 0}, {"train": 100}),
        ({"validation_split": "test"}, {"train": 100, "validation": 20}),
        ({"test_split": "test", "max_eval_samples": 5}, {"train": 84, "validation": 5, "test": 5}),
        ({"train_split": "train[:50]", "max_train_samples": 7}, {"train": 7, "validation": 8}),
    ],
)
def test_parts(flags, sizes):
    parts = sources.choose_parts(DataArguments(**flags), SPLITS, seed=0, test=False, strata=STRATA)
    assert {name: len(part) for name, part in parts.items()} == sizes


def test_a_split_called_validation_is_used():
    splits = {"train": SPLITS["train"], "validation": SPLITS["test"]}
    parts = sources.choose_parts(DataArguments(), splits, seed=0, test=False, strata=STRATA)
    assert len(parts["train"]) == 100 and len(parts["validation"]) == 20


def test_only_the_splits_that_are_used_need_the_columns():
    splits = SPLITS | {"validation": SPLITS["test"], "unused": Dataset.from_dict({"x": [1]})}
    columns, of = ["label"], dict(seed=0, test=False, strata=STRATA)
    assert len(sources.choose_parts(DataArguments(), splits, columns, **of)["train"]) == 100
    with pytest.raises(InputError, match="'unused' has no column 'label'; its columns are 'x'"):
        sources.choose_parts(DataArguments(test_split="unused"), splits, columns, **of)


def test_the_validation_part_is_stratified_seeded_and_apart():
    labels = np.array([0] * 80 + [1] * 20)
    train, validation = sources.stratified_split(labels, 0.15, seed=1)
    assert np.bincount(labels[validation]).tolist() == [12, 3]
    assert sorted([*train, *validation]) == list(range(100))
    assert np.array_equal(validation, sources.stratified_split(labels, 0.15, seed=1)[1])
    assert not np.array_equal(validation, sources.stratified_split(labels, 0.15, seed=2)[1])


def test_subsets_are_seeded():
    assert sources.random_subset(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    subset = sources.random_subset(100, 10, 0)
    assert len(set(subset)) == 10 and np.array_equal(subset, sources.random_subset(100, 10, 0))
    assert not np.array_equal(subset, sources.random_subset(100, 10, 1))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_label_noise_replaces_its_fraction_by_other_classes(fraction):
    labels = np.tile([2, 5, 7], 400)
    noisy = label_tools.with_label_noise(labels, [2, 5, 7], fraction, seed=3)
    changed = noisy != labels
    assert changed.sum() == round(fraction * len(labels)) and set(noisy) == {2, 5, 7}
    if fraction == 1:
        # each of the two others about equally often
        assert abs((noisy[labels == 2] == 5).mean() - 0.5) < 0.1
    assert np.array_equal(noisy, label_tools.with_label_noise(labels, [2, 5, 7], fraction, seed=3))


@pytest.mark.parametrize(
    "values, feature, names, encoded",
    [
        ([2, 0], ClassLabel(names=["a", "b", "c"]), ["a", "b", "c"], [2, 0]),
        (["y", "x", "y"], Value("string"), ["x", "y"], [1, 0, 1]),
        ([30, 4], Value("int64"), ["4", "30"], [1, 0]),
    ],
)
def test_labels_of_every_kind(values, feature, names, encoded):
    part = sources.take_split({"train": labelled(values, feature)}, "train", "train_split")
    assert label_tools.class_names(part, "label") == names
    assert label_tools.encode_labels(part, "label", names).tolist() == encoded


def test_labels_are_matched_by_name():
    part = sources.take_split(SPLITS, "test", "test_split")
    assert set(label_tools.encode_labels(part, "label", ["c", "b", "a"])) == {0}


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([0, 2], ["a", "b"], "row 1 of 'train' has the label 'c', for which the model has no class"),
        ([0, -1], ["a", "b"], "row 1 of 'train' has no label"),
        ([0, None], ["a", "b"], "row 1 of 'train' has no label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, names, message):
    part = sources.take_split({"train": labelled(labels)}, "train", "train_split")
    with pytest.raises(InputError, match=message):
        label_tools.encode_labels(part, "label", names)


def test_columns_that_hold_no_labels_are_refused():
    part = sources.take_split({"train": labelled([0.5], Value("float32"))}, "train", "train_split")
    with pytest.raises(InputError, match="--label_column_name 'label' holds no class labels"):
        label_tools.class_names(part, "label")


def test_a_missing_column_lists_those_that_exist():
    assert sources.find_column(SPLITS["train"], None, ["labels", "label"], "label_column_name") == "label"
    for given in ("y", None):
        with pytest.raises(InputError, match="columns are 'x', 'label'"):
            sources.find_column(SPLITS["train"], given, ["labels"], "label_column_name")


@pytest.mark.parametrize("form", ["dataset", "dict", "csv"])
def test_local_folders_are_read(tmp_path, form):
    folder = tmp_path / "data"
    if form == "dataset":
        SPLITS["train"].save_to_disk(folder)
    elif form == "dict":
        DatasetDict(SPLITS).save_to_disk(folder)
    else:
        folder.mkdir()
        SPLITS["train"].to_csv(folder / "train.csv")
    args = DataArguments(dataset_name=str(folder))
    splits = sources.load_splits(args, built_in={}, cache_dir=str(tmp_path / "cache"))
    assert len(splits["train"]) == 100
    assert ("test" in splits) == (form == "dict")


def test_a_built_in_dataset_is_not_hidden_by_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    splits = sources.load_splits(DataArguments(dataset_name="small"), built_in={"small": lambda: SPLITS["train"]})
    assert len(splits["train"]) == 100


def test_an_unreachable_dataset_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--dataset_name 'no/such' is neither a folder here nor reachable"):
        sources.load_splits(DataArguments(dataset_name="no/such"), built_in={})
