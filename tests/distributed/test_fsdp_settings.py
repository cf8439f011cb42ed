"""Every setting, the measures and the trainers of other libraries under FSDP2 by accelerate's own settings."""

import pytest

from tests.distributed import fsdp_settings as workers
from tests.distributed import rollouts
from tests.distributed.fsdp_workers import all_of
from tests.models import max_difference
from tests.processes import run_group

pytestmark = pytest.mark.slow

LAYERS = dict.fromkeys(("sft", "sft-lora", "dpo", "dpo-lora"), "LlamaDecoderLayer") | {"sentence": "BertLayer"}


def test_every_setting_equals_one_process_and_so_do_the_measures(tmp_path):
    ranks = run_group(all_of, tmp_path, workers.settings, workers.part_of_the_window, workers.flatness)
    for name in workers.SETTINGS:
        expected = workers.in_one_process(tmp_path / "one" / name, name)
        for found in ranks:
            assert max_difference(found["settings"][name], expected) <= 1e-14, name
    for found in ranks:
        assert found["part_of_the_window"] <= 1e-14
        (on_shards, whole), trace = found["flatness"]
        assert on_shards == pytest.approx(whole, rel=1e-10) and trace == 0.0


@pytest.mark.parametrize("case", LAYERS)
def test_other_libraries_are_themselves_and_as_under_ddp(tmp_path, case):
    for found in run_group(workers.libraries, tmp_path, {case: LAYERS[case]}):
        neutral, from_ddp = found[case]
        assert neutral == 0.0 and from_ddp <= 1e-6  # float32


def test_a_trainer_that_generates_is_itself_and_as_under_ddp(tmp_path):
    assert_is_itself(tmp_path, "FSDP2")


def assert_is_itself(tmp_path, engine):
    ddp = run_group(rollouts.compare, "grpo", tmp_path / "ddp")[0]
    for found in run_group(rollouts.compare, "grpo", tmp_path / "shards", engine):
        assert found["difference"] == 0.0 and found["logs"] and found["alike"]
        assert found["calls"][0] == found["calls"][1] == found["calls"][2]
        assert found["sharpness"] == pytest.approx(ddp["sharpness"], rel=1e-3) and min(found["sharpness"]) > 0
