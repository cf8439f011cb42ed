"""The configs for `accelerate launch` are those of the installed accelerate, and say what their names say."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import OffloadPolicy

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "recipes" / "accelerate"
# By file: machines, engine, ZeRO's stage.
FILES = {
    "one_gpu": (1, DistributedType.NO, None),
    "ddp": (1, DistributedType.MULTI_GPU, None),
    "fsdp2": (1, DistributedType.FSDP, None),
    "zero2": (1, DistributedType.DEEPSPEED, 2),
    "zero3": (1, DistributedType.DEEPSPEED, 3),
    "several_nodes": (2, DistributedType.FSDP, None),
}


@pytest.fixture(autouse=True)
def environment():
    """Accelerate writes into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def load(name):
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_accelerate_loads_it(name):
    config = load(name)
    found = config.num_machines, config.distributed_type, config.deepspeed_config.get("zero_stage")
    assert found == FILES[name]
    assert config.num_processes % config.num_machines == 0
    assert (config.num_processes > 1) == (name != "one_gpu")


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_knows_every_setting(name):
    """It takes what it does not know for a setting of the environment, silently."""
    known = launch_command_parser()._option_string_actions
    config = load(name)
    for setting, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        action = known[f"--{setting}"]
        assert action.choices is None or str(value) in map(str, action.choices), setting


@pytest.mark.parametrize("name", ["fsdp2", "several_nodes"])
def test_fsdp_is_that_of_version_2(name, monkeypatch):
    args = launch_command_parser().parse_args(["train.py"])
    config = load(name)
    vars(args).update(
        config.fsdp_config, use_fsdp=True, dynamo_backend="no", num_processes=2, num_machines=1, mixed_precision="no"
    )
    for variable, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading
    assert type(plugin.cpu_offload) is OffloadPolicy and not plugin.activation_checkpointing


def test_every_config_is_tested_and_on_the_page():
    assert {path.stem for path in FOLDER.iterdir()} == set(FILES)
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert all(f"`{name}.yaml`" in page for name in FILES)
