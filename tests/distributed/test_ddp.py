"""One trajectory, whatever the number of processes."""

import pytest
import torch

from hf_lookbehind import Lookbehind, LookbehindConfig
from tests.distributed import workers
from tests.models import OPTIMIZERS, TangledMLP, groups, max_difference
from tests.processes import run_group


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return workers.train_all(tmp_path_factory.mktemp("one"), batch=8, accumulation=1)


def assert_same(results, expected, tolerance=1e-10):
    for name, (weights, logs, _) in expected.items():
        assert max_difference(results[name][0], weights) <= tolerance, name
        for key, values in logs.items():
            assert results[name][1][key] == pytest.approx(values, rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_accumulation_equals_one_big_batch(tmp_path, one_process, batch, accumulation):
    assert_same(workers.train_all(tmp_path, batch, accumulation), one_process)


@pytest.mark.parametrize(("batch", "accumulation"), [pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_two_processes_equal_one(tmp_path, one_process, batch, accumulation):
    ranks = run_group(workers.train_all, tmp_path, batch, accumulation)
    for results in ranks:
        assert_same(results, one_process)
        assert {wrapper for _, _, wrapper in results.values()} == {"DistributedDataParallel"}
    for name in one_process:
        assert max_difference(ranks[0][name][0], ranks[1][name][0]) == 0.0


@pytest.mark.slow
def test_three_processes_on_uneven_windows_stay_identical(tmp_path):
    """28 images over 3 processes: the last window is padded by HF's sampler, and is the same for all."""
    ranks = run_group(workers.train_all, tmp_path, 3, 1, workers.METHODS, 28, world=3)
    for name in workers.METHODS:
        assert max_difference(ranks[0][name][0], ranks[1][name][0]) == 0.0
        assert max_difference(ranks[0][name][0], ranks[2][name][0]) == 0.0


def test_all_reduces_per_step(tmp_path):
    """k+1 gradients are reduced, or k where each process climbs its own."""
    from tests.training import PLAIN, make_model

    parameters = sum(p.numel() for p in make_model(**PLAIN).parameters())
    configs = [dict(k=3, sync_ascent=True), dict(k=3, sync_ascent=False)]
    for found in run_group(workers.all_reduces, tmp_path, configs):
        assert [sizes.count(parameters) for sizes in found] == [3 * 4, 3 * 3]


# ---- m-sharpness ----


class TwoMinds:
    """Two processes by hand: each climbs its own gradient, both descend the average."""

    def __init__(self, k, rho, alpha):
        self.k, self.rho, self.alpha = k, rho, alpha
        shards = [workers._shard_of_mlp(rank) for rank in range(2)]
        self.model, self.loss_fns = shards[0][0], [loss_fn for _, loss_fn in shards]
        self.optimizer = OPTIMIZERS["sgd"](groups(self.model))
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def gradient(self, weights, loss_fn):
        self.write(weights)
        self.model.zero_grad()
        loss_fn(self.model).backward()
        return [None if p.grad is None else p.grad.clone() for p in self.params]

    def write(self, weights):
        for p, value in zip(self.params, weights, strict=True):
            p.data.copy_(value)

    def step(self):
        phi = [p.detach().clone() for p in self.params]
        fast, points, self.norms = phi, [phi, phi], [[], []]
        for _ in range(self.k):
            for rank, loss_fn in enumerate(self.loss_fns):
                g = self.gradient(points[rank], loss_fn)
                norm = sum((x**2).sum() for x in g if x is not None) ** 0.5
                self.norms[rank].append(norm.item())
                points[rank] = [
                    p if x is None else p + self.rho * x / (norm + 1e-16) for p, x in zip(points[rank], g, strict=True)
                ]
            pairs = zip(*(self.gradient(points[r], f) for r, f in enumerate(self.loss_fns)), strict=True)
            self.write(fast)
            for p, (a, b) in zip(self.params, list(pairs), strict=True):
                p.grad = None if a is None else (a + b) / 2
            self.write(fast)
            self.optimizer.step()
            fast = [p.detach().clone() for p in self.params]
        self.write([p + self.alpha * (f - p) for p, f in zip(phi, fast, strict=True)])


@pytest.mark.parametrize("k", [1, 3])
def test_each_process_climbs_its_own_gradient_and_all_descend_the_average(k):
    config = dict(k=k, rho=0.05, alpha=0.5)
    expected = TwoMinds(**config)
    for _ in range(4):
        expected.step()
    for rank, (weights, norms, unused) in enumerate(run_group(workers.m_sharpness_by_hand, config)):
        assert max_difference(weights, {n: p.detach() for n, p in expected.model.named_parameters()}) < 1e-12
        assert norms == pytest.approx(expected.norms[rank], rel=1e-9)
        assert unused is None  # what no process used stays without a gradient


def test_all_processes_abandon_an_iteration_together():
    cases = [(at, sync_ascent) for at in (0, 2, 3) for sync_ascent in (True, False)]
    for ranks in zip(*run_group(workers.non_finite_on_one_rank, dict(k=3), cases), strict=True):
        for seen in ranks:
            assert [skipped for skipped, _ in seen] == [False, True, False]
            assert max_difference(seen[1][1], seen[0][1]) == 0.0 < max_difference(seen[2][1], seen[1][1])
        for one, other in zip(*ranks, strict=True):
            assert max_difference(one[1], other[1]) == 0.0


def test_one_process_alone_needs_no_group():
    torch.manual_seed(0)
    model = TangledMLP().double()
    optimizer = OPTIMIZERS["sgd"](groups(model))
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(sync_ascent=False))
    x = torch.randn(4, 6, dtype=torch.float64)

    def closure():
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert lookbehind.step(closure).isfinite() and not lookbehind.stats.skipped
