"""What docs/distributed.md and docs/loops.md show runs as it stands, and N processes train as one."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import launch
from tests.models import max_difference

slow = pytest.mark.slow

SCRIPTS = dict(zip(("accelerate", "ddp", "fsdp"), launch.blocks("loops.md", "python"), strict=True))
TORCHRUN, ACCELERATE_LAUNCH, _ = launch.documented_commands("distributed.md")
[TORCHRUN_SCRIPT] = launch.documented_commands("loops.md")


def weights(folder, world=2):
    return [torch.load(folder / f"weights-{rank}.pt") for rank in range(world)]


def write(folder, name):
    script = folder / "train.py"
    script.write_text(SCRIPTS[name])
    return script


def assert_two_equal_one(two, one):
    (alone,) = weights(one, world=1)
    first, second = weights(two)
    assert {w.dtype for w in alone.values()} == {torch.float64}
    assert max_difference(first, second) == 0.0
    assert max_difference(first, alone) <= 1e-10


@pytest.mark.parametrize("name", ["accelerate", pytest.param("ddp", marks=slow), "fsdp"])
def test_two_processes_of_a_script_equal_one(tmp_path, name):
    script = write(tmp_path, name)
    launch.run_script(script, tmp_path / "one")
    launch.run_script(script, tmp_path / "two", world=2)
    assert_two_equal_one(tmp_path / "two", tmp_path / "one")


@slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_of_a_script_under_torchrun_equal_one(tmp_path, name):
    script = write(tmp_path, name)
    launch.run_script(script, tmp_path / "one")
    launch.run({tmp_path: TORCHRUN_SCRIPT})
    assert_two_equal_one(tmp_path, tmp_path / "one")


@slow
def test_m_sharpness_keeps_the_processes_identical_and_is_another_method(tmp_path):
    script = write(tmp_path, "accelerate")
    launch.run_script(script, tmp_path / "sync")
    launch.run_script(script, tmp_path / "one", "--m-sharpness")
    launch.run_script(script, tmp_path / "two", "--m-sharpness", world=2)
    (sync,), (one,) = weights(tmp_path / "sync", world=1), weights(tmp_path / "one", world=1)
    first, second = weights(tmp_path / "two")
    assert max_difference(one, sync) == 0.0  # one process has nobody to differ from
    assert max_difference(first, second) == 0.0
    assert max_difference(first, one) > 1e-6


@slow
@pytest.mark.parametrize("command", [TORCHRUN, ACCELERATE_LAUNCH], ids=["torchrun", "accelerate"])
def test_two_processes_of_the_program_equal_one(tmp_path, command):
    launch.run({tmp_path: [*command, *launch.EXACT]})
    two = load_file(tmp_path / "runs" / "digits" / "model.safetensors")
    assert max_difference(two, launch.one_process(tmp_path / "one")) <= 1e-10
