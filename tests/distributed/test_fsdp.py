"""Sharded parameters (FSDP2) give the trajectory of whole ones."""

import pytest
import torch
import transformers
from packaging.version import Version

from hf_lookbehind import Lookbehind, LookbehindConfig
from tests.distributed import workers
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference, weights_of
from tests.processes import run_group
from tests.training import PLAIN, make_model

pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="torch 2.6 shards on GPUs only")


@pytest.mark.parametrize(
    ("model_name", "world", "replicas"),
    [
        pytest.param("vit", 2, 1, marks=pytest.mark.slow),
        ("mlp", 3, 1),
        pytest.param("vit", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_core_on_shards_equals_core_on_whole_parameters(model_name, world, replicas):
    auto = {f"{ascent}, auto": dict(k=2, rho="auto", ascent=ascent) for ascent in RHO}
    methods = workers.METHODS | auto
    ranks = run_group(workers.fsdp_core, methods, model_name, replicas, world=world)
    smallest = [results["sam"][2] for results in ranks]
    assert model_name == "vit" or min(smallest) == 0 < max(smallest)  # uneven shards, empty ones among them
    for name, config in methods.items():
        model, loss_fn = MODELS[model_name]()
        lookbehind = Lookbehind(model, OPTIMIZERS["adamw"](groups(model)), LookbehindConfig(**config))
        for _ in range(6):
            lookbehind.step(closure_of(model, loss_fn))
        for results in ranks:
            weights, stats, _ = results[name]
            assert max_difference(weights, weights_of(model)) <= 1e-10, name
            assert stats.grad_norms == pytest.approx(lookbehind.stats.grad_norms, rel=1e-9)
            assert stats.alpha == pytest.approx(lookbehind.stats.alpha, rel=1e-9)


def test_an_error_between_forward_and_backward_leaves_the_next_forward_at_phi():
    """FSDP2 keeps whole copies of the perturbed weights then."""
    for before, after in run_group(workers.fsdp_error_between_forward_and_backward):
        assert after == before


def test_several_meshes_m_sharpness_and_a_model_of_shards_from_elsewhere_are_refused(tmp_path):
    for meshes, m_sharpness, elsewhere in run_group(workers.refusals_on_shards, tmp_path):
        assert "lie on several meshes (tensor parallelism)" in meshes and "Use DDP" in meshes
        assert "sync_ascent=False is not allowed with sharded parameters" in m_sharpness
        assert "sharded before the training is not supported" in elsewhere and "5.19 or later" in elsewhere


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="Trainers take sharded models since transformers 5.19"
)
def test_trainer_on_a_model_sharded_at_load_time_equals_one_process(tmp_path):
    methods = {name: workers.METHODS[name] for name in ("sam", "lookbehind-asam-adaptive-global")}
    make_model(torch.float64, **PLAIN).save_pretrained(tmp_path / "source")
    expected = workers.train_all(tmp_path / "one", batch=8, accumulation=1, methods=methods)
    ranks = run_group(workers.fsdp_trainer, tmp_path / "source", tmp_path / "out", methods)
    for name in methods:
        for results in ranks:
            assert max_difference(results[name], expected[name][0]) <= 1e-10, name
    for results in ranks:
        assert (
            max_difference(results["loaded"], results["best"]) == 0.0 < max_difference(results["best"], results[name])
        )
