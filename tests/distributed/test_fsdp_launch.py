"""The programs under `accelerate launch` with the config file of FSDP2: on two CPUs that say that they are GPUs."""

import shutil
import sys
from argparse import __doc__ as text
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_lookbehind.scripts
from hf_lookbehind.scripts.evaluate_flatness import main as evaluate_flatness
from tests.distributed import launch
from tests.models import max_difference

ROOT = Path(__file__).parents[2]
CONFIG = Path(hf_lookbehind.scripts.__path__[0], "recipes", "accelerate", "fsdp2.yaml")
PRETENDED = ["--use_cpu", "true", "--accelerator_config", '{"use_configured_state": true}']
LOOKBEHIND = "--k 2 --rho 0.02 --alpha adaptive --learning_rate 1e-3 --disable_tqdm true".split()
IMAGES = ["--dataset_name", "digits", "--augmentation", "none", *launch.EXACT]
TEXTS = (
    "--train_file text.txt --vocab_size 300 --block_size 32 --dtype float64 --max_steps 4 --train_val_split 0".split()
)
TEXTS += ["--config_overrides", "n_embd=16,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"]


def sharded(module, layer, *flags, form="FULL_STATE_DICT"):
    launcher = ["accelerate", "launch", "--config_file", str(CONFIG), "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "--fsdp_transformer_layer_cls_to_wrap", layer]
    launcher += ["--fsdp_state_dict_type", form, "-m", "tests.distributed.pretended"]
    return [*launcher, f"hf_lookbehind.scripts.{module}", *flags, *LOOKBEHIND, *PRETENDED]


def alone(module, *flags):
    return [sys.executable, "-m", f"hf_lookbehind.scripts.{module}", *flags, *LOOKBEHIND, "--use_cpu", "true"]


def run(tmp_path, commands):
    launch.run({tmp_path / name: command for name, command in commands.items()}, PYTHONPATH=str(ROOT))


def weights(folder):
    saved = load_file(folder / "out" / "model.safetensors")
    saved.pop("lm_head.weight", None)  # the embeddings; gathered from shards it is another tensor, and saved too
    return saved


@pytest.mark.slow
def test_images_are_those_of_one_process_and_measured_as_any_model(tmp_path):
    flags = [*IMAGES, "--output_dir", "out", "--per_device_train_batch_size"]
    run(tmp_path, {"two": sharded("run_image_classification", "ViTLayer", *flags, "16")})
    run(tmp_path, {"one": alone("run_image_classification", *flags, "32")})
    found = weights(tmp_path / "two")
    assert all(p.dtype == torch.float64 for p in found.values())
    assert max_difference(found, weights(tmp_path / "one")) <= 1e-10
    assert '"train_engine": "FSDP2"' in (tmp_path / "two" / "out" / "all_results.json").read_text()
    measured = ["--rho", "0.05", "--sigma", "0.1", "--dataset_name", "digits", "--test_split", "train[:32]"]
    assert evaluate_flatness([str(tmp_path / "two" / "out"), *measured, "--output_dir", str(tmp_path / "flat")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_language_model_is_resumed_by_the_same_command(tmp_path, form):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text, encoding="utf-8")
    flags = [*TEXTS, "--output_dir", "out", "--save_steps", "2", "--per_device_train_batch_size"]
    two = sharded("run_clm", "GPT2Block", *flags, "2", form=form)
    run(tmp_path, {"two": two})
    run(tmp_path, {"one": alone("run_clm", *flags, "4")})
    found = weights(tmp_path / "two")
    assert max_difference(found, weights(tmp_path / "one")) <= 1e-10
    shutil.rmtree(tmp_path / "two" / "out" / "checkpoint-4")
    run(tmp_path, {"two": [*two, "--resume_from_checkpoint", "last"]})
    assert max_difference(weights(tmp_path / "two"), found) == 0.0
