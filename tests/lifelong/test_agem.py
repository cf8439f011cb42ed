"""A-GEM: the projection, the gradient that it is made against, and that nothing else comes of it."""

import copy

import numpy as np
import pytest
import torch

from hf_lookbehind.lifelong import AGEM, ReplayMemory, train_sequence
from hf_lookbehind.lifelong.replay_methods import project
from tests.lifelong.streams import SHORT, factory, run, stream
from tests.models import max_difference, weights_of
from tests.training import PLAIN, make_model


def in_parts(vector):
    return [torch.tensor(part, dtype=torch.float64) for part in (vector[:6].reshape(2, 3), vector[6:])]


def as_vector(parts):
    return torch.cat([part.flatten() for part in parts])


def test_the_projection_equals_the_formula_and_no_longer_opposes_the_memory():
    draw = np.random.default_rng(0)
    for _ in range(20):
        g, r = draw.normal(size=10), draw.normal(size=10)
        g = g if g @ r < 0 else -g
        projected = as_vector(project(in_parts(g), in_parts(r))).numpy()
        np.testing.assert_allclose(projected, g - (g @ r) / (r @ r) * r, rtol=1e-12, atol=1e-14)
        assert projected @ r >= -1e-14
        # the nearest such vector: what was taken away lies along the reference
        assert np.linalg.norm(g - projected) == pytest.approx(abs(g @ r) / np.linalg.norm(r))


def test_a_gradient_that_does_not_oppose_the_memory_stays_as_it_is():
    g = np.arange(10.0)
    gradients = in_parts(g)
    assert project(gradients, in_parts(g + 1)) is gradients
    assert project(gradients, in_parts(0 * g)) is gradients
    assert project(gradients, in_parts(g * np.nan)) is gradients  # the training's own gradient is what counts


class Watched(AGEM):
    """Looks at every projection."""

    def settings(self, tasks, current):
        self.mask = tasks.mask(current)
        return super().settings(tasks, current)

    def attach(self, trainer):
        super().attach(trainer)
        self.seen = getattr(self, "seen", [])

    def project(self, pass_index):
        trainer = self._trainer
        parameters = list(trainer.model.parameters())
        raw = [p.grad.clone() for p in parameters]
        super().project(pass_index)
        dot = sum((p.grad * r).sum() for p, r in zip(parameters, self._reference, strict=True))
        expected = project(raw, self._reference)
        assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))
        self.seen.append((trainer.state.global_step, pass_index, float(dot), raw is not expected))


def test_each_descent_is_projected_against_the_memory(tmp_path):
    agem = Watched(ReplayMemory(12, "balanced"))
    make = factory(dict(k=3, rho=0.05), dtype=torch.float64, **SHORT)
    train_sequence(make, stream("task"), agem, output_dir=tmp_path)
    # two tasks with a memory, 6 steps each, 3 descents
    assert [(step, i) for step, i, *_ in agem.seen] == [(s, i) for _ in range(2) for s in range(6) for i in (1, 2, 3)]
    assert min(dot for *_, dot, _ in agem.seen) >= -1e-12
    assert {projected for *_, projected in agem.seen} == {True, False}


def test_the_reference_is_the_gradient_of_the_memory_at_the_slow_weights(tmp_path):
    class AtStart(Watched):
        @torch.enable_grad()
        def project(self, pass_index):
            if pass_index == 1:
                model = copy.deepcopy(self._trainer.model).requires_grad_(True)
                examples = self.memory.draw(4, self._trainer.state.global_step, 0)
                pixels = torch.stack([e["pixel_values"] for e in examples]).double()
                labels = torch.tensor([e["labels"] for e in examples])
                loss = self.mask.loss(model(pixel_values=pixels), labels)
                self.expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
            super().project(pass_index)
            # for all descents of the window
            for r, e in zip(self._reference, self.expected, strict=True):
                torch.testing.assert_close(r, e, rtol=1e-10, atol=1e-14)

    model = make_model(torch.float64, num_labels=6, **PLAIN)
    agem = AtStart(ReplayMemory(12, "balanced"))
    # at k=3 the second descent starts from fast weights
    train_sequence(factory(dict(k=3, rho=0.05), model=model, **SHORT), stream(), agem, output_dir=tmp_path)
    assert len(agem.seen) == 36


def test_the_memorys_gradient_leaves_no_trace_in_random_numbers_or_gradients(tmp_path):
    class Unprojected(AGEM):
        def project(self, pass_index):
            parameters = [p for p in self._trainer.model.parameters() if p.requires_grad]
            before = [p.grad for p in parameters]
            assert any(r is not None for r in self._gradient_on_memory(parameters))
            assert all(p.grad is g for p, g in zip(parameters, before, strict=True))

    agem = Unprojected(ReplayMemory(12, "balanced"))
    traced = train_sequence(factory(**SHORT), stream(), agem, output_dir=tmp_path / "agem").trainer.model
    naive = run(tmp_path / "naive", "none", **SHORT).trainer.model
    assert max_difference(traced, weights_of(naive)) == 0.0
