"""Two processes under the trainers of other libraries."""

import os
from pathlib import Path

import pytest

from hf_lookbehind.trainer.trained import trained_module
from tests.distributed import rollouts
from tests.libraries import make_library_trainer
from tests.models import max_difference, weights_of
from tests.processes import run_group

CONFIGS = {"plain": None, "no perturbation": dict(k=1, rho=0, alpha=1), "lookbehind": dict(k=3, rho=0.05)}


def train_all(case, folder):
    """Final weights and the logged metrics of every configuration."""
    results, folder = {}, Path(folder, os.environ["RANK"])  # each loads a model folder of its own
    for name, config in CONFIGS.items():
        trainer = make_library_trainer(case, folder, config, max_steps=2)
        trainer.train()
        logs = [{key: log.get(key) for key in ("loss", "num_tokens", "entropy")} for log in trainer.state.log_history]
        results[name] = weights_of(trained_module(trainer)), logs
    return results


@pytest.mark.parametrize("case", ["sft-lora"])
def test_two_processes_are_the_library_s_own_trainer(tmp_path, case):
    first, second = run_group(train_all, case, tmp_path)
    assert max_difference(first["plain"][0], first["no perturbation"][0]) == 0.0
    assert first["plain"][1] == first["no perturbation"][1]
    for name in CONFIGS:
        assert max_difference(first[name][0], second[name][0]) == 0.0
    assert max_difference(first["plain"][0], first["lookbehind"][0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", rollouts.CASES)
def test_a_trainer_that_generates_is_the_library_s_own_in_two_processes(tmp_path, name):
    for results in run_group(rollouts.compare, name, tmp_path):
        assert results["difference"] == 0.0 and results["logs"] and results["alike"]
        assert results["calls"][0] == results["calls"][1] == results["calls"][2]
        assert all(rise > 0 for rise in results["sharpness"])
        assert results["wrapped"] == "DistributedDataParallel"
