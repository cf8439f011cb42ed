"""`loss_line` and `loss_plane`: where they go through, and which way."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import loss_line, loss_plane
from tests.live import bytes_of, imports_set_aside, live_in_forwards, live_tensors
from tests.measures.problems import BiasFree, Everything, classified, examples, image_batches, vit


def loss_of(model, batches=None):
    model = model.eval()
    batches = batches or [examples()]
    with torch.no_grad():
        total = sum(classified(model, batch).item() * len(batch[0]) for batch in batches)
    return total / sum(len(batch[0]) for batch in batches)


def test_a_line_goes_through_the_model_and_a_plane_through_the_line():
    model, batches = BiasFree(), [examples()]
    line = loss_line(model, batches, [-0.5, 0, 0.5], loss_fn=classified)
    plane = loss_plane(model, batches, [-0.5, 0, 0.5], [0.0, 1.0], loss_fn=classified)
    assert line.coordinates == plane.x == [-0.5, 0.0, 0.5] and plane.y == [0.0, 1.0]
    assert line.losses[1] == pytest.approx(loss_of(model), rel=1e-12)
    assert plane.losses[0] == pytest.approx(line.losses, rel=1e-12)
    assert len(plane.losses) == 2 and plane.losses[1] != pytest.approx(line.losses, rel=1e-3)


def test_each_filter_moves_by_its_own_length_and_vectors_stay():
    model = vit()
    with torch.no_grad():
        model.classifier.weight[1] *= 100
        model.classifier.weight[2] = 0
    before, seen = {name: p.detach().clone() for name, p in model.named_parameters()}, []

    def loss_fn(net, batch):
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
        return net(**batch).loss

    loss_line(model, image_batches((8,)), [0.25], loss_fn=loss_fn)
    for name, w in before.items():
        moved = seen[-1][name] - w
        if w.ndim == 1:
            assert not moved.any(), name
        else:
            torch.testing.assert_close(moved.flatten(1).norm(dim=1), 0.25 * w.flatten(1).norm(dim=1))
    assert seen[-1]["classifier.weight"][2].count_nonzero() == 0


def test_a_line_does_not_change_when_filters_are_rescaled_to_the_same_function():
    """What filters are normalised for."""
    lines = [loss_line(BiasFree(scale), [examples()], loss_fn=classified) for scale in (1.0, 8.0)]
    assert lines[0].losses == pytest.approx(lines[1].losses, rel=1e-9)


def test_other_seeds_give_other_directions_and_the_same_seed_the_same():
    first, again, other = (loss_line(BiasFree(), [examples()], [0.5], loss_fn=classified, seed=s) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_a_line_between_two_checkpoints_has_their_losses_at_its_ends(as_state_dict):
    first, second = (Everything().eval() for _ in range(2))
    with torch.no_grad():
        for tensor in (second.embed.weight, second.frozen.weight, second.head.bias, second.norm.running_var):
            tensor.add_(0.3)  # a tied, a frozen one, a vector, a buffer
    batches = [examples(dtype=torch.float32)]

    def loss_fn(net, batch):
        torch.manual_seed(0)
        return classified(net, batch)

    def at_home(net):
        return loss_line(net, batches, [0], loss_fn=loss_fn).losses[0]

    line = loss_line(first, batches, to=second.state_dict() if as_state_dict else second, loss_fn=loss_fn)
    assert (line.coordinates[0], line.coordinates[-1], len(line.losses)) == (0, 1, 21)
    assert line.losses[0] == at_home(first) != line.losses[-1] == at_home(second)


@pytest.mark.parametrize("measure", [loss_line, loss_plane])
def test_one_copy_of_what_moves_lives(measure):
    with imports_set_aside():
        model, batches = vit(), image_batches((8,))
        before, moving = live_tensors(), sum(p.nbytes for p in model.parameters() if p.ndim > 1)
        live = live_in_forwards(model, {3})
        measure(model, batches, [-1, 0, 1])
        assert [bytes_of(tensors - before) for tensors in live] == [moving]


def test_results_are_plain_data():
    line = loss_line(BiasFree(), [examples()], (0, 1), loss_fn=classified)
    plane = loss_plane(BiasFree(), [examples()], torch.tensor([0.0, 1.0]).tolist(), loss_fn=classified)
    for result in (line, plane):
        assert json.loads(json.dumps(dataclasses.asdict(result))) == dataclasses.asdict(result)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(coordinates=[]), r"coordinates=\[\]"),
        (dict(coordinates=[0, math.inf]), "inf"),
        (dict(coordinates=1.0), "coordinates=1.0"),
        (dict(seed="1"), "seed='1'"),
        (dict(to=3), "to=int"),
        (dict(to={}), "to: 'first.weight' is missing"),
        (dict(to=nn.ModuleDict({"first": nn.Linear(2, 2)})), r"'first.weight' is \(2, 2\).*\(6, 4\)"),
        (dict(loss_fn=lambda net, batch: classified(net, batch) * math.nan), "is nan"),
    ],
)
def test_bad_input_is_named(changes, named):
    arguments = dict(batches=[examples()], loss_fn=classified) | changes
    with pytest.raises(InputError, match=named):
        loss_line(BiasFree(), **arguments)


def test_bad_planes_and_models_without_filters_are_named():
    with pytest.raises(InputError, match=r"y=\[\]"):
        loss_plane(BiasFree(), [examples()], y=[], loss_fn=classified)
    with pytest.raises(InputError, match="no filters"):
        loss_plane(nn.LayerNorm(4), [torch.ones(1, 4)], loss_fn=lambda net, x: net(x).mean())
