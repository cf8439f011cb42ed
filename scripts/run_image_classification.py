"""Fine-tune an image classifier with Lookbehind-SAM, Lookbehind-ASAM, SAM, ASAM or the plain optimizer (--k 0).

A small vision transformer from scratch, on the digits that come with the program:

    hf-lookbehind image-classification --dataset_name digits --train_split "train[:1000]" \\
        --output_dir runs/digits --augmentation none \\
        --per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 15

Fine-tune it on other digits, rotated and partly mislabelled, with Lookbehind-ASAM:

    hf-lookbehind image-classification --model_name_or_path runs/digits --dataset_name digits \\
        --train_split "train[1000:1256]" --test_split "train[1256:]" --corruption rotation --label_noise 0.2 \\
        --k 5 --ascent asam --rho 0.1 --augmentation none --output_dir runs/rotated \\
        --per_device_train_batch_size 32 --learning_rate 1e-3 --num_train_epochs 15

A pretrained model on image folders (<class>/<image>), the best model kept:

    hf-lookbehind image-classification --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir data/train --validation_dir data/validation --k 2 --rho 0.02 --eval_strategy epoch \\
        --save_strategy epoch --load_best_model_at_end --output_dir runs/folders

Flags may stand in a file, and those after it override: ... image-classification settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.arguments import ModelArguments
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.cli.paths import exists
from hf_lookbehind.programs.data import images, labels, sources
from hf_lookbehind.programs.data.epochs import EpochCallback
from hf_lookbehind.programs.data.image_files import image_folder, image_splits
from hf_lookbehind.programs.data.labels import NoisyLabelArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

BUILT_IN = {"digits": images.digits}
TASK = "ForImageClassification"
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# A new model's images are not larger, unless --config_overrides says so.
LARGEST_NEW_IMAGE = 32


@dataclass
class ImageDataArguments(NoisyLabelArguments):
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Id of a dataset on the Hub, a local folder of one or of images (<class>/<image>, or splits of "
            "these), or 'digits' (built in)."
        },
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, <class>/<image>, at any depth below a class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of validation images, alike."})
    image_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the images. Default: {' or '.join(IMAGE_COLUMNS)}."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: {', '.join(LABEL_COLUMNS)}."}
    )
    corruption: str = field(
        default="none",
        metadata={"help": "How all images, of every split, are spoilt.", "choices": images.CORRUPTIONS},
    )
    corruption_strength: float = field(
        default=0.25, metadata={"help": "Standard deviation of --corruption noise; pixels range from 0 to 1."}
    )
    augmentation: str = field(
        default="crop",
        metadata={
            "help": "Of training images: zero-padded random crops, horizontal flips.",
            "choices": images.AUGMENTATIONS,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset_name is None) == (self.train_dir is None):
            raise InputError("one of --dataset_name and --train_dir is needed, and only one")
        if self.validation_dir is not None and self.train_dir is None:
            raise InputError("--validation_dir needs --train_dir")
        if not (math.isfinite(self.corruption_strength) and self.corruption_strength >= 0):
            raise InputError(
                f"--corruption_strength {self.corruption_strength} is not allowed: a finite number, 0 or more"
            )

    def check_files(self) -> None:
        super().check_files()
        for name in ("train_dir", "validation_dir"):
            folder = getattr(self, name)
            if folder is not None and not (exists(folder) and Path(folder).expanduser().is_dir()):
                raise InputError(f"--{name} {folder!r}: there is no such folder")

    def inputs(self) -> dict[str, str | None]:
        inputs = {name: getattr(self, name) for name in ("dataset_name", "train_dir", "validation_dir")}
        return {name: value for name, value in inputs.items() if value not in BUILT_IN}


@dataclass
class ImageModelArguments(ModelArguments):
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Id or folder of another image processor than the model's."}
    )

    def inputs(self) -> dict[str, str | None]:
        return super().inputs() | {"image_processor_name": self.image_processor_name}


def make_parser() -> FlagParser:
    return FlagParser(data=ImageDataArguments, model=ImageModelArguments, description=__doc__)


def load_images(args: Arguments) -> dict[str, Dataset]:
    """The splits of the dataset, or the image folders as splits."""
    if args.data.train_dir is not None:
        folders = {"train": args.data.train_dir, "validation": args.data.validation_dir}
        return {split: image_folder(folder, f"{split}_dir") for split, folder in folders.items() if folder is not None}
    if args.data.dataset_name not in BUILT_IN and args.data.dataset_config_name is None:
        splits = image_splits(args.data.dataset_name, "dataset_name")
        if splits is not None:
            return splits
    # the first process fills the cache, the others read it
    with args.training.main_process_first(desc="loading the dataset"):
        return sources.load_splits(
            args.data, built_in=BUILT_IN, cache_dir=args.model.cache_dir, token=args.model.token
        )


def new_config(args: Arguments, image_size: int) -> ViTConfig:
    """A small vision transformer for images of this size, in 4x4 patches."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        # about 1/sqrt(hidden_size): with the 0.02 of large models so small a one hardly starts to learn
        initializer_range=0.1,
        image_size=min(image_size, LARGEST_NEW_IMAGE),
    )
    overridden = loading.override(config, args.model.config_overrides)
    if "patch_size" not in overridden:
        config.patch_size = max(1, cast(int, config.image_size) // 4)
    for name in ("image_size", "patch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--config_overrides {name}={getattr(config, name)} is not allowed: 1 or more")
    return config


def load_processor(args: Arguments, config: PreTrainedConfig, image_size: int) -> Any:
    """The model's image processor; a new model gets one that scales to its image size and to [-1, 1]."""
    for flag in ("image_processor_name", "model_name_or_path"):
        name = getattr(args.model, flag)
        if name is not None:
            with loading.blamed_on(flag, name):
                return AutoImageProcessor.from_pretrained(name, **loading.hub_options(args.model))
    size = getattr(config, "image_size", image_size)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    mean_and_std: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ViTImageProcessorPil(size={"height": height, "width": width}, do_convert_rgb=True, **mean_and_std)


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    training = args.training
    splits = load_images(args)
    some = sources.take_split(splits, args.data.train_split, "train_split").dataset
    image_column = sources.find_column(some, args.data.image_column_name, IMAGE_COLUMNS, "image_column_name")
    label_column = sources.find_column(some, args.data.label_column_name, LABEL_COLUMNS, "label_column_name")
    seed = training.seed_of_data
    strata = partial(labels.classes_that_occur, column=label_column)
    columns = [image_column, label_column]
    parts = sources.choose_parts(args.data, splits, columns, seed=seed, test=training.do_predict, strata=strata)
    names = labels.class_names(parts["train"], label_column)

    image_parts = {split: images.undecoded(part, image_column) for split, part in parts.items()}
    image_size = images.first_image_size(image_parts["train"], image_column)
    config = loading.load_config(args.model) or new_config(args, image_size)
    if getattr(config, "num_channels", 3) != 3:
        raise InputError(f"num_channels={config.num_channels} is not supported: images have 3 channels, RGB")
    classes, new_head = loading.choose_classes(config, names, TASK, args.model)
    encoded = {split: labels.encode_labels(part, label_column, classes) for split, part in parts.items()}
    labels.check_classes(encoded["train"], classes, parts["train"])
    encoded["train"] = labels.with_label_noise(
        encoded["train"], [classes.index(name) for name in names], args.data.label_noise, args.data.corruption_seed
    )

    processor = load_processor(args, config, image_size)
    corruption = images.Corruption(args.data.corruption, args.data.corruption_strength, args.data.corruption_seed)
    datasets = {
        split: images.ImageDataset(part, image_column, encoded[split], processor, corruption)
        for split, part in image_parts.items()
    }
    datasets["train"].augment(args.data.augmentation, seed)
    images.preload_within(list(datasets.values()))
    training.remove_unused_columns = False
    load_model = partial(
        loading.build_classifier, AutoModelForImageClassification, args.model, config, classes, new_head=new_head
    )
    return Task(
        datasets=datasets,
        load_model=load_model,
        processing_class=processor,
        make_collator=lambda model: images.ImageCollator(model.dtype),
        metrics=evaluation.of_classes(training.metric or ["accuracy"], len(classes)),
        callbacks=[EpochCallback(datasets["train"])],
        classes=classes,
    )


PROGRAM = Program("image-classification", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
