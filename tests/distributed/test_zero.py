"""DeepSpeed's ZeRO under the Trainer: one process with the same global batch, saved, resumed, interrupted, refused."""

import importlib.util
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from hf_lookbehind.optim import partitions
from tests.distributed import zero
from tests.distributed.launch import run
from tests.distributed.test_fsdp_settings import assert_is_itself
from tests.distributed.workers import METHODS, train_all
from tests.models import max_difference, weights_of
from tests.processes import run_group
from tests.training import PLAIN, images, make_model, train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="`make test-deepspeed` has DeepSpeed"
)
# float32: one process adds gradients up in another order. The trainings move weights by about 5e-3.
ROUNDING = 1e-6
ROOT = Path(__file__).parents[2]
each_stage = pytest.mark.parametrize("stage", zero.STAGES)


def test_the_installed_version_has_the_names_that_are_touched():
    from deepspeed.runtime import base_optimizer, engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    source = "".join(inspect.getsource(module) for module in (base_optimizer, engine, stage3, stage_1_and_2))
    names = set(re.findall(r"(?:\bzero|self\.zero|engine)\.(\w+)", inspect.getsource(partitions)))
    assert "_optimizer_step" in names and len(names) > 20
    assert [name for name in names if name not in source] == []


def one_process(output_dir, config, model=None, **options):
    trainer = train(
        output_dir, config, model=make_model(**PLAIN) if model is None else model, data=images(24),
        per_device_train_batch_size=8, **(zero.RUN | options),
    )  # fmt: skip
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def of_folder(folder):
    return weights_of(ViTForImageClassification.from_pretrained(folder))


@each_stage
def test_it_equals_one_process(tmp_path, stage):
    """Six methods, accumulated and not; each process holds a part of the weights (asserted in the workers)."""
    ranks = run_group(zero.trainings, tmp_path, stage, METHODS, (1, 2))
    weights = {name: one_process(tmp_path / "one", config) for name, config in METHODS.items()}
    for results in ranks:
        for (name, accumulation), (found, logged) in results.items():
            difference = max_difference(found, weights[name])
            print(f"stage {stage}, {name}, accumulation {accumulation}: {difference:.1e}")
            assert difference <= ROUNDING, (name, accumulation)
            assert logged == ranks[0][name, accumulation][1]  # means over the processes
    assert max_difference(weights["sam"], weights["lookbehind-sam"]) > 1e-4


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
@each_stage
def test_neutral_settings_are_plain_deepspeed_bit_for_bit(tmp_path, stage, options):
    for results in run_group(zero.neutral, tmp_path, stage, options):
        for name, (difference, has_same_logs) in results.items():
            assert difference == 0.0 and has_same_logs, name


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
@each_stage
def test_a_resumed_run_is_the_whole_one(tmp_path, stage, options):
    for difference, missing in run_group(zero.resumed, tmp_path, stage, options):
        assert difference == 0.0 and missing is None


@each_stage
def test_the_best_model_and_what_is_saved_are_the_masters(tmp_path, stage):
    for best, weights, from_partitions in run_group(zero.saved_and_best, tmp_path, stage):
        for found in (from_partitions, of_folder(best), of_folder(tmp_path)):
            assert max_difference(weights, found) == 0.0


@pytest.mark.parametrize("where", ["loss", "layer", "backward", "step"])
@each_stage
def test_an_exception_leaves_the_slow_weights_in_masters_and_model(tmp_path, stage, where):
    data = images(8)
    batch = {"pixel_values": torch.stack([d["pixel_values"] for d in data]), "labels": torch.arange(8) % 4}
    for moved, slow, loss, error in run_group(zero.failed, tmp_path, stage, where):
        assert moved == 0.0
        assert max_difference(of_folder(tmp_path), slow) == 0.0
        model = make_model(**PLAIN)
        model.load_state_dict(slow)
        assert loss == pytest.approx(model(**batch).loss.item(), abs=ROUNDING)
        assert "a second train() of a Trainer" in error


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
@each_stage
def test_a_gradient_that_is_not_finite_in_one_process_moves_nothing(tmp_path, stage, options):
    for moved, skipped, _ in run_group(zero.non_finite, tmp_path, stage, options):
        assert moved[0] == 0.0 and min(moved[1:]) > 1e-4
        assert skipped == [None, 1, 1, 1, 1, 1][: len(skipped)]


@each_stage
def test_float16_finds_its_loss_scale(tmp_path, stage):
    (plain, neutral, iterated), _ = run_group(zero.searching_its_scale, tmp_path, stage)
    assert plain[0] == neutral[0] and max_difference(plain[1], neutral[1]) == 0.0
    _, weights, skipped, scale, counted = iterated
    assert skipped == counted > 10 and scale < 2**20
    assert max_difference(weights, make_model(**PLAIN)) > 1e-4


@each_stage
def test_what_else_people_set_changes_nothing(tmp_path, stage):
    by_schedule = {
        name: one_process(tmp_path / name, METHODS["lookbehind-sam-adaptive"], lr_scheduler_type=name)
        for name in ("linear", "constant")
    }
    for results in run_group(zero.variants, tmp_path, stage):
        for name, weights in results.items():
            reference = by_schedule["constant" if name == zero.BY_THE_CONFIG else "linear"]
            assert max_difference(weights, reference) <= ROUNDING, name


@each_stage
def test_adapters_equal_those_of_one_process(tmp_path, stage):
    reference = one_process(tmp_path / "one", METHODS["lookbehind-sam-adaptive"], model=zero.adapted())
    for weights in run_group(zero.adapters, tmp_path, stage):
        assert max_difference(weights, reference) <= ROUNDING


@each_stage
def test_other_settings_equal_one_process(tmp_path, stage):
    for results in run_group(zero.trainings, tmp_path, stage, zero.SETTINGS, (2,)):
        for (name, _), (weights, _) in results.items():
            assert max_difference(weights, one_process(tmp_path / "one", zero.SETTINGS[name])) <= ROUNDING, name


@each_stage
def test_a_part_of_the_window_is_that_of_ddp(tmp_path, stage):
    """Each process draws of its own share."""
    config = {"part": dict(k=2, rho=0.02, ascent_fraction=0.5)}
    ddp = run_group(train_all, tmp_path / "ddp", 2, 2, config)
    for results in run_group(zero.trainings, tmp_path / "zero", stage, config, (2,)):
        weights = {n: w.double() for n, w in results["part", 2][0].items()}
        assert max_difference(weights, ddp[0]["part"][0]) <= ROUNDING


@each_stage
def test_how_many_collectives_an_iteration_takes(tmp_path, stage):
    counts, _ = run_group(zero.collectives, tmp_path, stage)
    plain = counts["plain"]["all_gather_into_tensor"]
    gathers = {case: count["all_gather_into_tensor"] / plain for case, count in counts.items()}
    # Stages 1 and 2 know an adaptive alpha after ZeRO's own publication of the weights only.
    assert gathers == {"plain": 1, (1, "static"): 2, (3, "static"): 4, (3, "adaptive"): 4 if stage == 3 else 5}
    if stage == 3:
        reductions = [counts[case]["reduce_scatter_tensor"] for case in gathers]
        assert reductions == [n * reductions[0] for n in (1, 2, 4, 4)]


@each_stage
def test_a_trainer_that_generates_is_itself_and_as_under_ddp(tmp_path, stage):
    assert_is_itself(tmp_path, stage)


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    for said in run_group(zero.refusals, tmp_path):
        for name, refusal in said.items():
            assert name in refusal and "not supported" in refusal, (name, refusal)


# What a CPU needs before the launched program runs.
ON_CPU = """
import runpy, sys
from tests.distributed.zero import use_deepspeed
use_deepspeed()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


IMAGES = "run_image_classification --dataset_name digits --max_train_samples 64 --augmentation none"
TEXTS = "run_clm --train_file text.txt --block_size 32"
NEW = {
    IMAGES: "--config_overrides hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32",
    TEXTS: "--vocab_size 300 --config_overrides n_embd=16,n_layer=1,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
}
COMMON = "--train_val_split 0 --save_strategy no --gradient_accumulation_steps 2 --use_cpu --learning_rate 1e-3 "
# with the epsilon of AdamW, a gradient of zero but for rounding would move its weight by the whole learning rate
ITERATE = "--k 2 --rho 0.02 --alpha adaptive --max_steps 4 --adam_epsilon 1e-3 --model_name_or_path ../new"


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("program", [IMAGES, TEXTS], ids=["images", "texts"])
def test_the_programs_under_the_launcher_with_a_ready_config(tmp_path, name, program):
    two, one, new = (tmp_path / folder for folder in ("two", "one", "new"))
    for folder in (two, one, new):
        folder.mkdir()
        (folder / "text.txt").write_text(inspect.getsource(inspect), encoding="utf-8")
        (folder / "on_cpu.py").write_text(ON_CPU, encoding="utf-8")
    module, *flags = f"{program} {COMMON}".split()
    alone = [sys.executable, "-m", f"hf_lookbehind.scripts.{module}", *flags]
    run({new: [*alone, *NEW[program].split(), "--max_steps", "1", "--output_dir", "."]}, PYTHONPATH=str(ROOT))
    flags += [*ITERATE.split(), "--output_dir", "out", "--per_device_train_batch_size"]
    config = ROOT / "scripts" / "recipes" / "accelerate" / f"{name}.yaml"
    launch = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2", "on_cpu.py", alone[2]]
    state = ["--accelerator_config", '{"use_configured_state": true}']
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    run({two: [*launch, *flags, "2", *state]}, PYTHONPATH=paths, DS_ACCELERATOR="cpu")
    run({one: [*alone[:3], *flags, "4"]}, PYTHONPATH=str(ROOT))
    results = json.loads((two / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_engine"] == name.replace("zero", "ZeRO-") and results["train_processes"] == 2
    found, expected = (load_file(folder / "out" / "model.safetensors") for folder in (two, one))
    assert max_difference({name: found[name] for name in expected}, expected) <= ROUNDING
    assert max_difference({name: load_file(new / "model.safetensors")[name] for name in expected}, expected) > 1e-4
