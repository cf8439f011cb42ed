"""Reading, corrupting and augmenting images."""

import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import TrainerState, ViTImageProcessorPil

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.data import images
from hf_lookbehind.programs.data.epochs import EpochCallback
from hf_lookbehind.programs.data.sources import take_split

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


def test_large_images_change_in_blocks_as_in_one_piece(monkeypatch):
    image, deep = (
        random_image(size=(30, 20)),
        PILImage.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 109),
    )
    whole = images.Corruption("noise", 0.3)(image), images._eight_bits(deep, "deep")
    monkeypatch.setattr(images, "BLOCK", 100)
    assert whole == (images.Corruption("noise", 0.3)(image), images._eight_bits(deep, "deep"))


def test_few_large_images_are_decoded_at_once(monkeypatch):
    """Not as many as a batch has: 40 photos of 12 megapixels would be 2 GB."""
    held, most = [], []

    def open_image(value, where, real=images.open_image):
        image = real(value, where)
        held.append(weakref.ref(image))
        most.append(sum(4 * each.width * each.height for each in (ref() for ref in held) if each is not None))
        return image

    monkeypatch.setattr(images, "open_image", open_image)
    monkeypatch.setattr(images, "DECODED_BYTES", 100_000)
    photos = [random_image(i, size=(100, 100)) for i in range(20)]
    dataset = dataset_of([*photos, random_image()])
    dataset.preload()
    assert len(most) == 21 and max(most) <= 100_000 + 40_000
    alone = torch.cat([dataset_of([photo]).__getitems__([0])[0]["pixel_values"][None] for photo in photos])
    assert torch.equal(dataset.pixels[:20], alone)


def test_an_image_that_pillow_refuses_for_its_size_is_named(monkeypatch):
    dataset = dataset_of([random_image(), random_image(size=(30, 30))])
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 500)  # where it warns; at twice as many it refuses
    assert len(dataset.__getitems__([0, 1])) == 2
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match="row 1 of 'train' is too large: Image size .900 pixels. exceeds limit"):
        dataset.preload()


def test_images_that_the_processor_leaves_of_several_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(images, "DECODED_BYTES", 1000)
    dataset = dataset_of([random_image(size=(size, 4)) for size in (100, 100, 4)])
    dataset.processor = ViTImageProcessorPil(do_resize=False)
    for read in (dataset.preload, lambda: dataset.__getitems__([0, 1, 2])):
        with pytest.raises(InputError, match="the image processor cannot take images of 'train'"):
            read()


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
    for name in ("nowhere.png", "."):
        with pytest.raises(InputError, match=f"row 1 of 'train': '.*{name}' is no file here"):
            dataset_of([random_image(), str(tmp_path / name)]).preload()


def part_of(column):
    return take_split({"train": Dataset(pa.table({"image": column}))}, "train", "train_split")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_paths_are_paths_whatever_text_a_reader_makes_of_them(tmp_path, kind):
    random_image().save(tmp_path / "0.png")
    paths = pa.array([str(tmp_path / "0.png")] * 2)
    part = images.undecoded(
        part_of(paths.dictionary_encode() if pa.types.is_dictionary(kind) else paths.cast(kind)), "image"
    )
    assert images.open_image(part.dataset[1]["image"], "row 1") == random_image()


@pytest.mark.parametrize("path, message", [("nowhere.png", "'nowhere.png' is no file here"), ("", "has no image")])
def test_a_path_of_no_file_is_named_before_anything_is_read(path, message):
    with pytest.raises(InputError, match=f"row 0 of 'train'.*{message}"):
        images.undecoded(part_of(pa.array([path], pa.large_string())), "image")


def test_a_column_without_images_is_refused():
    data = Dataset.from_dict({"image": [1, 2]}, features=Features({"image": Value("int64")}))
    with pytest.raises(InputError, match="--image_column_name 'image' holds no images"):
        images.undecoded(take_split({"train": data}, "train", "train_split"), "image")


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
    callback = EpochCallback(dataset)
    for at, epoch in ((0, 0), (2.0, 2), (2.75, 2)):
        callback.on_epoch_begin(None, TrainerState(epoch=at), None)
        assert int(dataset.augmentation.epoch) == epoch


def test_the_collator_follows_the_precision_of_the_model():
    dataset = dataset_of([random_image(i) for i in range(3)])
    made = images.ImageCollator(torch.float64)([dataset[i] for i in range(3)])
    assert made["pixel_values"].dtype == torch.float64 and made["pixel_values"].shape == (3, 3, 8, 8)
    assert made["labels"].tolist() == [0, 1, 0]
