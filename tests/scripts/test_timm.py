"""Models of timm in the program for images, where timm and torchvision load: `make test-torchvision`."""

import json

import pytest
import torch

from tests.caches import set_caches
from tests.models import max_difference

timm = pytest.importorskip("timm", reason="`make test-torchvision` has timm", exc_type=ImportError)

from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification  # noqa

from hf_lookbehind import LookbehindConfig, LookbehindTrainer  # noqa: E402
from hf_lookbehind.scripts.run_image_classification import main, train  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

ARCHITECTURES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet")
DIGITS = "--dataset_name digits --augmentation none --max_train_samples 128 --max_eval_samples 32 --save_strategy no"
QUICK = f"{DIGITS} --per_device_train_batch_size 16 --max_steps 3 --k 2 --rho 0.02 --disable_tqdm true".split()


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def make_model(architecture, num_labels=4):
    torch.manual_seed(0)
    sized = dict(img_size=32) if "vit" in architecture else {}
    config = TimmWrapperConfig(
        architecture=architecture, num_labels=num_labels, model_args=dict(drop_rate=0.1, **sized)
    )
    return TimmWrapperForImageClassification(config)


def saved(folder, architecture, names):
    """As the Hub has them: with timm's own settings of the images."""
    model = make_model(architecture, len(names))
    pretrained = timm.create_model(architecture, pretrained=False).pretrained_cfg
    wanted = "interpolation crop_pct mean std num_classes pool_size first_conv classifier".split()
    model.config.pretrained_cfg = {k: pretrained[k] for k in wanted if k in pretrained} | {"input_size": [3, 32, 32]}
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neutral_settings_are_the_plain_trainer_bit_for_bit(tmp_path, architecture):
    """BatchNorm's statistics, dropout and drop path among them."""
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 4} for i in range(16)]
    args = dict(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainers = {}
    for config in (None, LookbehindConfig(k=1, rho=0.0, alpha=1)):
        cls, own = (Trainer, {}) if config is None else (LookbehindTrainer, dict(lookbehind_config=config))
        trainers[config] = cls(
            model=make_model(architecture), args=TrainingArguments(tmp_path, **args), train_dataset=data, **own
        )
        trainers[config].train()
    plain, ours = (dict(trainer.model.state_dict()) for trainer in trainers.values())
    assert max_difference({n: w.double() for n, w in plain.items()}, {n: w.double() for n, w in ours.items()}) == 0.0


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_second_fine_tune_has_its_own_classes_and_a_new_head(tmp_path, architecture):
    """The digits' ten classes, over a model of ten others; then again, over that."""
    first = saved(tmp_path / "first", architecture, [f"kind {i}" for i in range(10)])
    flags = ["--model_name_or_path", first, *QUICK, "--learning_rate", "1e-12"]
    assert main([*flags, "--output_dir", str(tmp_path / "refused")]) == 2  # its head knows other classes
    results = train([*flags, "--ignore_mismatched_sizes", "--output_dir", str(tmp_path / "second")])
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    old, new = AutoModelForImageClassification.from_pretrained(first), results.trainer.model
    head = new.timm_model.get_classifier().weight
    assert (head - old.timm_model.get_classifier().weight).abs().max() > 1e-3  # drawn anew
    body = [(n, p) for n, p in new.named_parameters() if "fc." not in n and "head." not in n]
    assert max((p - dict(old.named_parameters())[n]).abs().max().item() for n, p in body) < 1e-6
    again = train(["--model_name_or_path", str(tmp_path / "second"), *QUICK, "--output_dir", str(tmp_path / "third")])
    assert again.trainer.model.config.id2label == new.config.id2label
    assert "eval_accuracy" in again.metrics
