"""Reading, corrupting and augmenting images."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import TrainerState, ViTImageProcessorPil

from hf_lookbehind.config import InputError
from hf_lookbehind.finetune import image_files, images
from hf_lookbehind.finetune.data import take_split

PROCESSOR = ViTImageProcessorPil(
    size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=PILImage.Resampling.NEAREST
)


def random_image(seed=0, mode="RGB", size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    return PILImage.fromarray(pixels, "RGBA").convert(mode)


def dataset_of(part_images, **kwargs):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    labels = [i % 2 for i in range(len(part_images))]
    data = Dataset.from_dict({"image": part_images, "label": labels}, features=features)
    part = images.undecoded(take_split({"train": data}, "train", "train_split"), "image")
    return images.ImageDataset(part, "image", np.array(labels), PROCESSOR, **kwargs)


def test_digits_are_all_there_in_a_fixed_order():
    data = images.digits()
    assert len(data) == 1797 and data.features["label"].names == list("0123456789")
    assert data[0]["image"].size == (8, 8) and data[0]["image"].mode == "L"
    counts = np.bincount(data["label"][:500])
    assert counts.min() > 30  # shuffled: every slice holds all classes
    images.digits.cache_clear()
    again = images.digits()
    assert again["label"][:] == data["label"][:] and again[7]["image"] == data[7]["image"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "LA", "CMYK"])
def test_images_of_every_mode_become_three_channels(mode, tmp_path):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    random_image(mode=mode).save(path)
    assert dataset_of([str(path)])[0]["pixel_values"].shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "RGB", "CMYK", "P"])
def test_deeper_and_other_pixels_keep_their_values(mode, tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    path = tmp_path / ("x.png" if mode in ("I;16", "P") else "x.tiff")
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        PILImage.frombytes(mode, (8, 8), (grey.astype(np.uint16) * 257).astype(order).tobytes()).save(path)
    elif mode == "I":
        PILImage.fromarray(grey.astype(np.int32) * 257).save(path)
    else:
        PILImage.fromarray(grey).convert("RGB").convert(mode, palette=PILImage.Palette.ADAPTIVE).save(path)
    opened = images.open_image({"path": str(path), "bytes": None}, "row 0")
    assert opened.mode == ("RGB" if mode in ("RGB", "CMYK", "P") else "L")
    assert np.array_equal(np.asarray(opened.convert("L")), grey)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.full((8, 8), 0.5, np.float32), "deep.tiff .row 0. has floating-point pixels"),
        (np.full((8, 8), 70000, np.int32), "deep.tiff .row 0. has pixels from 70000 to 70000"),
        (np.full((8, 8), -1, np.int32), "deep.tiff .row 0. has pixels from -1 to -1"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path, pixels, message):
    path = tmp_path / "deep.tiff"
    PILImage.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=message):
        images.open_image({"path": str(path), "bytes": None}, "row 0")


def test_corruptions():
    image = random_image()
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(np.asarray(images.Corruption("none")(image)), pixels)
    assert np.array_equal(np.asarray(images.Corruption("negative")(image)), 255 - pixels)
    assert np.array_equal(np.asarray(images.Corruption("rotation")(image)), np.rot90(pixels))


def test_noise_has_its_strength_and_depends_on_seed_and_image_only():
    grey = PILImage.new("L", (100, 100), 128)
    noisy = images.Corruption("noise", 0.1, seed=1)(grey)
    assert np.asarray(noisy).std() == pytest.approx(25.5, rel=0.05)
    assert noisy == images.Corruption("noise", 0.1, seed=1)(grey.copy())
    assert noisy != images.Corruption("noise", 0.1, seed=2)(grey)
    assert images.Corruption("noise", 0.1, seed=1)(grey.convert("RGB")).mode == "RGB"


def test_preloaded_pixels_are_the_lazy_ones():
    lazy = dataset_of([random_image(i) for i in range(5)], corruption=images.Corruption("noise"))
    ready = dataset_of([random_image(i) for i in range(5)], corruption=images.Corruption("noise"))
    images.preload_within([ready])
    assert ready.pixels is not None and lazy.pixels is None
    for i in range(5):
        assert torch.equal(lazy[i]["pixel_values"], ready[i]["pixel_values"])
        assert lazy[i]["labels"] == ready[i]["labels"] == i % 2


def test_pixels_beyond_the_budget_are_not_kept():
    dataset = dataset_of([random_image(i) for i in range(5)])
    images.preload_within([dataset], budget=dataset.size_in_memory() - 1)
    assert dataset.pixels is None


@pytest.mark.parametrize("stored", ["file", "bytes"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_image_is_named(tmp_path, stored, damage):
    path = tmp_path / "broken.png"
    random_image(size=(64, 64)).save(path)
    content = {"cut": path.read_bytes()[:200], "text": b"no image", "empty": b""}[damage]
    path.write_bytes(content)
    bad = str(path) if stored == "file" else {"bytes": content, "path": None}
    dataset = dataset_of([random_image(), bad])
    name = "broken.png .row 1 of 'train'" if stored == "file" else "row 1 of 'train'"
    with pytest.raises(InputError, match=f"damaged image: .*{name}"):
        dataset.preload()


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match="row 1 of 'train' has no image"):
        dataset_of([random_image(), None]).preload()
    with pytest.raises(InputError, match="nowhere.png"):
        dataset_of([random_image(), str(tmp_path / "nowhere.png")]).preload()


def test_a_column_without_images_is_refused():
    data = Dataset.from_dict({"image": [1, 2]}, features=Features({"image": Value("int64")}))
    with pytest.raises(InputError, match="--image_column_name 'image' holds no images"):
        images.undecoded(take_split({"train": data}, "train", "train_split"), "image")


def test_image_folders(tmp_path):
    for name in ("b/2.png", "a/1.png", "a/deep/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        random_image().save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = image_files.image_folder(str(tmp_path), "train_dir")
    assert data.features["label"].names == ["a", "b"] and data["label"][:] == [0, 0, 1]


@pytest.mark.parametrize(
    "folders, message", [([], "has no folder per class"), (["a", "b"], "there is no image in .a., .b.")]
)
def test_folders_without_images_are_refused(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=message):
        image_files.image_folder(str(tmp_path), "train_dir")


def augmented(kind, seed=0, epoch=0, size=(8, 8)):
    dataset = dataset_of([random_image(i, size=size) for i in range(20)])
    dataset.augment(kind, seed)
    dataset.set_epoch(epoch)
    return dataset


def batch(dataset, positions=range(20)):
    return torch.stack([example["pixel_values"] for example in dataset.__getitems__(list(positions))])


def test_augmentation_is_drawn_per_seed_epoch_and_example():
    expected = batch(augmented("crop_flip", epoch=3))
    torch.manual_seed(1)  # the global generators play no part
    again = augmented("crop_flip", epoch=3)
    assert torch.equal(expected[[7, 2]], batch(again, [7, 2]))
    assert torch.equal(expected[7], again[7]["pixel_values"])
    assert not torch.equal(expected, batch(augmented("crop_flip", epoch=4)))
    assert not torch.equal(expected, batch(augmented("crop_flip", seed=1, epoch=3)))


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_crops_are_shifts_of_the_image_padded_with_black(kind):
    plain, moved = batch(augmented("none")), batch(augmented(kind))
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1), value=-1)  # black, after the processor
    flips = (False, True) if kind == "crop_flip" else (False,)
    seen = set()
    for image, all_of_it in zip(moved, padded, strict=True):
        found = [
            (y, x, flip)
            for y in range(3)
            for x in range(3)
            for flip in flips
            if torch.equal(image.flip(-1) if flip else image, all_of_it[:, y : y + 8, x : x + 8])
        ]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 4 and {flip for *_, flip in seen} == set(flips)


def test_the_callback_sets_the_epoch_also_of_a_resumed_run():
    dataset = augmented("crop")
    callback = images.EpochCallback(dataset)
    for at, epoch in ((0, 0), (2.0, 2), (2.75, 2)):
        callback.on_epoch_begin(None, TrainerState(epoch=at), None)
        assert int(dataset.augmentation.epoch) == epoch


def test_the_collator_follows_the_precision_of_the_model():
    dataset = dataset_of([random_image(i) for i in range(3)])
    made = images.ImageCollator(torch.float64)([dataset[i] for i in range(3)])
    assert made["pixel_values"].dtype == torch.float64 and made["pixel_values"].shape == (3, 3, 8, 8)
    assert made["labels"].tolist() == [0, 1, 0]
