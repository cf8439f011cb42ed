"""Images for classification: the digits, decoding, corruptions, augmentation."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

from ...config import InputError
from ..cli.running import is_main_process, one_line
from .sources import Rows

CORRUPTIONS = ("none", "noise", "rotation", "negative")
AUGMENTATIONS = ("none", "crop", "crop_flip")
# What a damaged file makes PIL raise, by format.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, zlib.error)
PATH_TYPES = ("string", "large_string", "string_view")
# Preprocessed pixels up to this size stay in memory.
MEMORY_BUDGET = 2**30
# What is held on the way there: so many images at most, and not many more decoded bytes, of 4 for a pixel.
READ_BATCH = 256
DECODED_BYTES = 2**26
# Of those that a dataset stores in itself, so many are fetched at once, still encoded.
FETCHED = 16
# Numbers that a change of pixels has at once, instead of all those of a large image.
BLOCK = 2**20


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


def undecoded(part: Rows, column: str) -> Rows:
    """The part with images as files, to be opened here, where the name of a damaged one can be told.

    Raises:
        InputError: the column holds no images, or the path of no file.
    """
    feature = part.dataset.features[column]
    dataset = part.dataset.with_format(None).select_columns([column])
    if isinstance(feature, Value) and feature.dtype in PATH_TYPES:
        for i, path in enumerate(part.column(column)):
            _check_path(path, part.where(i))
        dataset = dataset.cast_column(column, Value("string"))  # the only text that is cast to images
    elif not isinstance(feature, Image):
        raise InputError(f"--image_column_name {column!r} holds no images: its type is {feature}")
    return Rows(dataset.cast_column(column, Image(decode=False)), part.rows, part.name)


def _check_path(path: str | None, where: str) -> None:
    if not path:
        raise InputError(f"{where} has no image")
    if not os.path.isfile(path):
        raise InputError(f"{where}: {path!r} is no file here; a relative path starts in the working directory")


def open_image(value: dict[str, Any] | None, where: str) -> PILImage.Image:
    """Decode an image of `Image(decode=False)`, upright; grey images stay grey ("L"), all others become "RGB".

    Raises:
        InputError: there is no image, it is damaged or too large; names its file, or its row where it has none.
    """
    if value is None:
        raise InputError(f"{where} has no image")
    if value["bytes"] is None:
        _check_path(value["path"], where)
    name = f"{value['path']} ({where})" if value["path"] else where
    try:
        with _open(value) as file:
            ImageOps.exif_transpose(file, in_place=True)
            image = _eight_bits(file, name)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except InputError:
        raise
    except PILImage.DecompressionBombError as error:
        raise InputError(f"{name} is too large: {one_line(error)}") from error
    except MemoryError as error:
        raise InputError(f"{name} is too large for the memory that is free") from error
    except DECODING_ERRORS as error:
        raise InputError(f"damaged image: {name} cannot be decoded ({one_line(error)})") from error


def _open(value: dict[str, Any]) -> PILImage.Image:
    with warnings.catch_warnings():
        # of half the size at which Pillow refuses an image
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
        return PILImage.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))


def _eight_bits(image: PILImage.Image, name: str) -> PILImage.Image:
    """A deeper grey image in 8 bits: PIL's own conversion cuts off all that is brighter than 255."""
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name} has pixels from {pixels.min()} to {pixels.max()}: save it with 8 or 16 bits")
    return _changed(pixels, lambda block: block / 257)


def _changed(pixels: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> PILImage.Image:
    """An image of changed pixels, rounded; some rows at a time, from above: a change makes arrays of large numbers."""
    rows = max(1, BLOCK // max(1, pixels[0].size))
    blocks = [change(pixels[start : start + rows]) for start in range(0, len(pixels), rows)]
    return PILImage.fromarray(np.concatenate([np.rint(block).clip(0, 255).astype(np.uint8) for block in blocks]))


@dataclass(frozen=True)
class Corruption:
    """Spoils images; the same image always in the same way, in whatever split or order it comes.

    Attributes:
        kind: "none"; "noise", Gaussian and independent per pixel; "rotation" by 90 degrees; "negative".
        strength: standard deviation of the noise, as a fraction of the range of pixel values.
        seed: of the noise, besides the image itself.
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
            generator = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
            return _changed(
                np.asarray(image), lambda block: block + generator.normal(0, 255 * self.strength, block.shape)
            )
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
        part: Rows,
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
            size = next(self._open([0])).size
            black = self._preprocess([PILImage.new("RGB", size)])[0]
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
            with self._blaming_the_processor():
                pixels[start : start + len(batch)] = batch
        self.pixels = pixels

    def _open(self, positions: Sequence[int]) -> Iterator[PILImage.Image]:
        for start in range(0, len(positions), FETCHED):
            some = positions[start : start + FETCHED]
            values = self.part.dataset[self.part.rows[list(some)]][self.column]
            for i, value in zip(some, values, strict=True):
                yield open_image(value, self.part.where(i))

    def _read(self, positions: Sequence[int]) -> Tensor:
        images = map(_as_rgb, map(self.corruption, self._open(positions)))
        # by `map`, which keeps no images while the next ones are decoded
        batches = list(map(self._preprocess, few_at_once(images, DECODED_BYTES)))
        with self._blaming_the_processor():
            return torch.cat(batches) if len(batches) > 1 else batches[0]

    def _preprocess(self, images: list[PILImage.Image]) -> Tensor:
        with self._blaming_the_processor():
            return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @contextmanager
    def _blaming_the_processor(self) -> Iterator[None]:
        try:
            yield
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the image processor cannot take images of {self.part.name}: {one_line(error)}"
            ) from error


def few_at_once(images: Iterable[PILImage.Image], limit: int) -> Iterator[list[PILImage.Image]]:
    """Lists of images, none of which would reach the limit of bytes without its last image."""
    held, size = [], 0
    for image in images:
        held.append(image)
        size += 4 * image.width * image.height
        del image  # the next one is decoded before the name is given to it
        if size >= limit:
            yield held
            held, size = [], 0
    if held:
        yield held


def _as_rgb(image: PILImage.Image) -> PILImage.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def first_image_size(part: Rows, column: str) -> int:
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
