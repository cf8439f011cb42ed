"""Images for classification: the digits, image folders, decoding, corruptions, augmentation."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..config import InputError
from .data import Part
from .program import is_main_process, one_line

CORRUPTIONS = ("none", "noise", "rotation", "negative")
AUGMENTATIONS = ("none", "crop", "crop_flip")
# What a damaged file makes PIL raise, by format.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, zlib.error, PILImage.DecompressionBombError)
# Preprocessed pixels up to this size stay in memory.
MEMORY_BUDGET = 2**30
READ_BATCH = 256


@lru_cache(maxsize=1)
def digits() -> Dataset:
    """scikit-learn's 1797 images of handwritten digits, 8x8, in one fixed order."""
    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = []
    for pixels in data.images[order]:
        file = io.BytesIO()
        PILImage.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict({"image": images, "label": data.target[order].tolist()}, features=features)


def image_folder(folder: str, flag: str) -> Dataset:
    """One folder per class, images below it, in the order of their names.

    Raises:
        InputError: the folder does not exist, has no folder per class, or holds no image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"--{flag} {folder!r}: there is no such folder")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"--{flag} {folder!r} has no folder per class: images belong in {root.name}/<class>/<image>")
    suffixes = PILImage.registered_extensions()
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(os.fspath(path) for path in (root / name).rglob("*") if path.suffix.lower() in suffixes)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise InputError(f"--{flag} {folder!r} is empty: there is no image in {', '.join(classes)}")
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    images = [{"bytes": None, "path": path} for path in paths]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def undecoded(part: Part, column: str) -> Part:
    """The part with images as files, to be opened here, where the name of a damaged one can be told.

    Raises:
        InputError: the column holds no images.
    """
    feature = part.dataset.features[column]
    if not isinstance(feature, Image) and feature != Value("string"):
        raise InputError(f"--image_column_name {column!r} holds no images: its type is {feature}")
    dataset = part.dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
    return Part(dataset, part.rows, part.name)


def open_image(value: dict[str, Any] | None, where: str) -> PILImage.Image:
    """Decode an image of `Image(decode=False)`, upright; grey images stay grey ("L"), all others become "RGB".

    Raises:
        InputError: there is no image or it is damaged; names its file, or its row where it has none.
    """
    if value is None:
        raise InputError(f"{where} has no image")
    name = f"{value['path']} ({where})" if value["path"] else where
    try:
        with PILImage.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as file:
            image = _eight_bits(ImageOps.exif_transpose(file), name)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except InputError:
        raise
    except DECODING_ERRORS as error:
        raise InputError(f"damaged image: {name} cannot be decoded ({one_line(error)})") from error


def _eight_bits(image: PILImage.Image, name: str) -> PILImage.Image:
    """A deeper grey image in 8 bits: PIL's own conversion cuts off all that is brighter than 255."""
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name} has pixels from {pixels.min()} to {pixels.max()}: save it with 8 or 16 bits")
    return PILImage.fromarray(np.rint(pixels / 257).astype(np.uint8))


@dataclass(frozen=True)
class Corruption:
    """Spoils images; the same image always in the same way, in whatever split or order it comes.

    Attributes:
        kind: "none"; "noise", Gaussian and independent per pixel; "rotation" by 90 degrees; "negative".
        strength: standard deviation of the noise, as a fraction of the range of pixel values.
        seed: of the noise, beside the image itself.
    """

    kind: str = "none"
    strength: float = 0.25
    seed: int = 0

    def __call__(self, image: PILImage.Image) -> PILImage.Image:
        if self.kind == "rotation":
            return image.transpose(PILImage.Transpose.ROTATE_90)
        if self.kind == "negative":
            return ImageOps.invert(image)
        if self.kind == "noise":
            pixels = np.asarray(image, dtype=np.float64)
            generator = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
            noisy = pixels + generator.normal(0, 255 * self.strength, pixels.shape)
            return PILImage.fromarray(np.rint(noisy).clip(0, 255).astype(np.uint8))
        return image


class Augmentation:
    """Random crops of the zero-padded image and random horizontal flips, drawn per (seed, epoch, example).

    The draws have a generator of their own. With the global one a resumed run would not be the uninterrupted one:
    the Trainer prefetches a batch before it restores the state of the global generators.

    Args:
        examples: number of examples in the dataset.
        black: a black image, preprocessed: what the padding consists of, of shape (channels, height, width).
        flip: whether to flip also.
        seed: of the draws.
    """

    def __init__(self, examples: int, black: Tensor, *, flip: bool, seed: int) -> None:
        self.examples, self.black, self.flip, self.seed = examples, black, flip, seed
        self.height, self.width = black.shape[-2:]
        self.padding = max(1, round(self.height / 8)), max(1, round(self.width / 8))
        # shared with the workers of a data loader, which may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, pixels: Tensor, examples: Tensor) -> Tensor:
        """Augment a batch, given the position of each of its examples in the dataset."""
        corners, flips = self._draws()
        down, right = self.padding
        size = self.height + 2 * down, self.width + 2 * right
        padded = self.black[:, :1, :1].expand(*pixels.shape[:2], *size).clone()
        padded[..., down : down + self.height, right : right + self.width] = pixels
        y = corners[examples, 0, None] + torch.arange(self.height)
        x = corners[examples, 1, None] + torch.arange(self.width)
        x = torch.where(flips[examples, None], x.flip(1), x)
        batch = torch.arange(len(pixels))[:, None, None]
        # the indexed dimensions come first: (batch, height, width, channels)
        return padded[batch, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def _draws(self) -> tuple[Tensor, Tensor]:
        """The crop corner and the flip of every example in this epoch."""
        epoch = int(self.epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            corners = generator.integers(0, 2 * np.array(self.padding) + 1, (self.examples, 2))
            flips = generator.random(self.examples) < (0.5 if self.flip else 0)
            self._drawn = epoch, torch.from_numpy(corners), torch.from_numpy(flips)
        return self._drawn[1:]


class ImageDataset(torch.utils.data.Dataset):
    """Preprocessed images and their labels, as a Trainer takes them.

    Args:
        part: its images undecoded (`undecoded`).
        column: of the images.
        labels: class of each example.
        processor: image processor of the model.
        corruption: applied to each image before it is preprocessed.
    """

    def __init__(
        self,
        part: Part,
        column: str,
        labels: np.ndarray,
        processor: Callable[..., Any],
        corruption: Corruption | None = None,
    ) -> None:
        self.part, self.column, self.processor = part, column, processor
        self.corruption = corruption or Corruption()
        self.labels = torch.from_numpy(labels)
        self.augmentation: Augmentation | None = None
        self.pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Tensor]]:
        examples = torch.as_tensor(positions)
        pixels = self._read(positions) if self.pixels is None else self.pixels[examples]
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, examples)
        labels = self.labels[examples]
        return [{"pixel_values": pixels[i], "labels": labels[i]} for i in range(len(examples))]

    def augment(self, kind: str, seed: int) -> None:
        """Augment from now on; `kind` is one of `AUGMENTATIONS`."""
        if kind != "none":
            image = self._open([0])[0]
            black = self._preprocess([PILImage.new("RGB", image.size)])[0]
            self.augmentation = Augmentation(len(self), black, flip=kind == "crop_flip", seed=seed)

    def set_epoch(self, epoch: int) -> None:
        if self.augmentation is not None:
            self.augmentation.epoch.fill_(epoch)

    def size_in_memory(self) -> int:
        """Bytes of all preprocessed images, as far as the first one tells."""
        return len(self) * self._read([0]).nbytes

    def preload(self) -> None:
        """Decode and preprocess every image once, and keep the result: a damaged one is found now.

        Raises:
            InputError: names the first damaged image.
        """
        batches = range(0, len(self), READ_BATCH)
        pixels = None
        hidden = None if is_main_process() else True  # None: shown on a terminal only
        for start in tqdm(batches, f"reading {self.part.name}", leave=False, disable=hidden):
            batch = self._read(range(start, min(start + READ_BATCH, len(self))))
            if pixels is None:
                pixels = batch.new_empty(len(self), *batch.shape[1:])
            pixels[start : start + len(batch)] = batch
        self.pixels = pixels

    def _open(self, positions: Sequence[int]) -> list[PILImage.Image]:
        values = self.part.dataset[self.part.rows[list(positions)]][self.column]
        return [open_image(value, self.part.where(i)) for i, value in zip(positions, values, strict=True)]

    def _read(self, positions: Sequence[int]) -> Tensor:
        return self._preprocess([self.corruption(image).convert("RGB") for image in self._open(positions)])

    def _preprocess(self, images: list[PILImage.Image]) -> Tensor:
        try:
            return self.processor(images=images, return_tensors="pt")["pixel_values"]
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the image processor cannot take images of {self.part.name}: {one_line(error)}"
            ) from error


def first_image_size(part: Part, column: str) -> int:
    """The longer side of the first image."""
    row = int(part.rows[0])
    return max(open_image(part.dataset[row][column], part.where(0)).size)


def preload_within(datasets: Sequence[ImageDataset], budget: int = MEMORY_BUDGET) -> None:
    """Preload all datasets if their pixels together fit the budget of bytes; else each image is read in its time."""
    if sum(dataset.size_in_memory() for dataset in datasets) <= budget:
        for dataset in datasets:
            dataset.preload()


@dataclass(frozen=True)
class ImageCollator:
    """Stacks examples to a batch, in the precision of the model."""

    dtype: torch.dtype = torch.float32

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]).to(self.dtype),
            "labels": torch.stack([example["labels"] for example in examples]),
        }


class EpochCallback(TrainerCallback):
    """Tells a dataset which epoch begins; after a resume that is the one that had begun before."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
