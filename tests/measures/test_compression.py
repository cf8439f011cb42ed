"""`compression`: the forms, by hand and as real quantisers make them, and that nothing is left behind."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import compression
from hf_lookbehind.measures._forms import form_of
from tests.measures.problems import Everything, assert_same_traces, traces

FORMS = ["int8", "int4", "int3", "int2", "int4:tensor", "nf4", "bf16", "fp8", "prune:0.7"]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def seen(model, *forms, **options):
    """The weights at each evaluation, and the records."""
    found = []
    records = compression(model, lambda net: found.append(weights(net)) or 0.0, forms, **options)
    return found, records


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def test_integers_are_the_nearest_of_symmetric_levels_of_each_output_channel_or_of_the_tensor():
    weight = torch.tensor([[7.5, -7.4, 1.4, -1.6], [0.75, 0.1, -0.31, 0.0], [0.0, 0.0, 0.0, 0.0]])
    (by_channel, by_tensor), _ = seen(linear(weight), "int4", "int4:tensor")
    # steps of 1 and 0.1; the largest level is 7 steps
    expected = [[7.0, -7.0, 1.0, -2.0], [0.7, 0.1, -0.3, 0.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(by_channel["weight"], torch.tensor(expected))
    expected[1] = [1.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(by_tensor["weight"], torch.tensor(expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_as_many_levels_as_the_bits_can_tell_apart_and_no_weight_further_than_half_a_step_but_at_the_top(bits):
    weight = rows(1, 5000)
    held = form_of(f"int{bits}")(weight)
    step = 2 * weight.abs().max() / (2**bits - 1)
    integers = held / step
    assert len(integers.round().unique()) <= 2**bits and (integers - integers.round()).abs().max() < 1e-4
    inside = weight < step * (2 ** (bits - 1) - 1)
    assert (held - weight).abs()[inside].max() <= step * 0.5001


def test_normal_floats_are_the_nearest_levels_of_blocks_of_64_consecutive_weights_the_last_one_shorter():
    weight = torch.zeros(2, 50)
    weight[0, :3] = torch.tensor([2.0, -1.0, 0.9])
    weight[1, 10:14] = torch.tensor([-0.5, 0.25, -0.1, 0.0])  # of the first block, whose maximum is 2
    weight[1, 14:16] = torch.tensor([0.02, 0.01])  # of the second
    (held,), _ = seen(linear(weight), "nf4")
    assert held["weight"][0, :3].tolist() == pytest.approx([2.0, -2 * 0.5250730514526367, 2 * 0.44070982933044434])
    first = [-2 * 0.28444138169288635, 2 * 0.16093020141124725, 0.0, 0.0]
    assert held["weight"][1, 10:14].tolist() == pytest.approx(first, abs=2 * 0.0911)
    assert held["weight"][1, 14:16].tolist() == pytest.approx([0.02, 0.02 * 0.44070982933044434])


def test_floats_of_fewer_bits_are_the_cast_with_one_scale_for_float8():
    weight = rows(8, 8) / 1000  # float8's smallest numbers lie further apart
    (cast, scaled), _ = seen(linear(weight), "bf16", "fp8")
    assert cast["weight"].equal(weight.bfloat16().float())
    scale = weight.abs().max() / 448
    assert scaled["weight"].equal((weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert ((scaled["weight"] - weight) / weight).abs().max() < 0.07


def test_pruning_zeroes_the_fraction_of_each_tensor_that_torch_prunes():
    net = nn.Sequential(linear(rows(9, 5)), linear(100 * rows(4, 9, seed=1)))
    (held,), _ = seen(net, "prune:0.7")
    for i, layer in enumerate(net):
        assert (held[f"{i}.weight"] == 0).sum() == round(0.7 * layer.weight.numel())
        prune.l1_unstructured(layer, "weight", amount=0.7)
        assert held[f"{i}.weight"].equal(layer.weight)


def test_records_hold_form_result_and_how_far_all_compressed_weights_moved_together():
    net = nn.Sequential(linear(torch.tensor([[3.0, -1.0]])), linear(torch.tensor([[2.0], [0.5]])))
    (record,) = compression(net, lambda m: torch.tensor([0.25]), ["prune:0.5"])
    # -1 and 0.5 are pruned
    assert record == {"form": "prune:0.5", "value": 0.25, "change": pytest.approx(math.sqrt(1.25 / 14.25))}


class Many(nn.Module):
    """A layer of each kind that is compressed, and what is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight
        self.linear = nn.Linear(4, 3)
        self.again = nn.Linear(4, 3)
        self.again.weight = self.linear.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.convolution = nn.Conv2d(2, 3, 2)
        self.transposed = nn.ConvTranspose1d(2, 3, 2)
        self.turned = Conv1D(5, 4)
        self.norm = nn.LayerNorm(4)
        self.position = nn.Parameter(torch.randn(1, 7, 4))


COMPRESSED = {"linear.weight", "frozen.weight", "convolution.weight", "transposed.weight", "turned.weight"}


def test_weights_of_linear_and_convolution_layers_are_compressed_and_nothing_else():
    net = Many()
    (held,), _ = seen(net, "int3")
    moved = {name for name, value in weights(net).items() if not held[name].equal(value)}
    assert moved == COMPRESSED


@pytest.mark.parametrize("name, axis", [("convolution", 0), ("transposed", 1), ("turned", 1)])
def test_each_output_channel_has_its_own_scale_wherever_the_layer_keeps_it(name, axis):
    net = Many()
    (held,), _ = seen(net, "int2")
    before, after = (of[f"{name}.weight"].movedim(axis, 0).flatten(1) for of in (weights(net), held))
    torch.testing.assert_close(after, form_of("int2")(before), rtol=0, atol=0)
    for channel in after:
        assert len(channel.unique()) <= 4


def test_a_weight_the_other_way_round_is_pruned_and_blocked_as_its_transpose():
    weight, turned = rows(40, 30), Conv1D(40, 30)
    turned.weight.data.copy_(weight.T)
    (straight, _), (other, _) = (seen(net, "nf4", "int4")[0] for net in (linear(weight), turned))
    assert other["weight"].T.equal(straight["weight"])


def test_named_parameters_are_compressed_instead_also_embeddings_and_by_either_name_of_a_tied_one():
    net = Many()
    for pattern, expected in ((r"^head\.", {"embedding.weight"}), ("position|bias", {"position"})):
        (held,), _ = seen(net, "int2", target_parameters=pattern)
        assert {name for name, value in weights(net).items() if not held[name].equal(value)} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_are_rounded_in_float32_or_better(dtype):
    net = linear(rows(6, 80)).to(dtype)
    found, _ = seen(net, *FORMS)
    for form, held in zip(FORMS, found, strict=True):
        precise = net.weight.detach().to(torch.promote_types(dtype, torch.float32))
        assert held["weight"].equal(form_of(form)(precise).to(dtype)), form


def test_no_form_is_a_compression_of_the_form_before():
    net = linear(rows(6, 80))
    alone, after = seen(net, "nf4")[0][0], seen(net, "int2", "nf4")[0][1]
    assert alone["weight"].equal(after["weight"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [torch.zeros(2, 3), torch.full((2, 3), 1e-44), torch.full((2, 3), -1e18)])
def test_weights_of_0_or_near_the_ends_of_the_numbers_stay_finite(form, weight):
    (held,), (record,) = seen(linear(weight), form)
    assert held["weight"].isfinite().all() and (held["weight"] - weight).abs().max() <= weight.abs().max()
    assert math.isfinite(record["change"])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_weights_buffers_gradients_modes_and_random_states_come_back_bit_for_bit_also_after_an_error(error):
    net = Everything()
    before, calls = traces(net), []

    def evaluate(model):
        calls.append(torch.rand(1).item())
        assert not model.training and not model.head.weight.equal(before["bits"]["head.weight"])
        model.norm.train()(torch.randn(5, 4))
        model.head.weight.requires_grad_(False)
        if error is not None and len(calls) == len(FORMS):
            raise error("no")
        return 0.5

    if error is None:
        compression(net, evaluate, FORMS)
    else:
        with pytest.raises(error, match="no"):
            compression(net, evaluate, FORMS)
    assert len(calls) == len(FORMS) and len(set(calls)) == 1
    assert_same_traces(traces(net), before)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"forms": []}, r"forms=\[\] is not allowed: a list of one or more of int8, "),
        ({"forms": "int4"}, "forms='int4' is not allowed: a list"),
        ({"forms": None}, "forms=None is not allowed"),
        ({"forms": ["int4", "int5"]}, "forms contains 'int5', which is not allowed: int8, int4, int3, int2"),
        ({"forms": ["int4:channel"]}, "forms contains 'int4:channel'"),
        ({"forms": ["int4:"]}, "forms contains 'int4:'"),
        ({"forms": ["nf4:tensor"]}, "forms contains 'nf4:tensor'"),
        ({"forms": ["prune"]}, "forms contains 'prune', .* prune:0.7"),
        ({"forms": ["prune:1"]}, "forms contains 'prune:1'"),
        ({"forms": ["prune:0"]}, "forms contains 'prune:0'"),
        ({"forms": ["prune:nan"]}, "forms contains 'prune:nan'"),
        ({"forms": [4]}, "forms contains 4"),
        ({"forms": ["nf4", "nf4"]}, "forms contains 'nf4' twice"),
        ({"target_parameters": "decoder"}, "'decoder'.* matches no"),
        ({"target_parameters": "bias"}, "'bias'.* matches no"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_evaluated(options, named):
    options = {"forms": ["int4"], **options}
    with pytest.raises(InputError, match=named):
        compression(Many(), lambda net: pytest.fail("evaluated"), options.pop("forms"), **options)


def test_a_model_with_nothing_to_compress_and_one_that_is_quantised_already_are_refused():
    with pytest.raises(InputError, match="no weight of a linear or convolution layer"):
        compression(nn.LayerNorm(3), lambda net: 0.0, ["int4"])
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="'1.weight' is quantised already .*uint8"):
        compression(net, lambda net: 0.0, ["int4"])


@pytest.mark.parametrize("value", [None, torch.ones(2), "0.5"])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises(InputError, match="gave .* at form int4: a number is wanted"):
        compression(nn.Linear(2, 2), lambda net: value, ["int4"])


# ---- real quantisers, of `make test-quantised` ----


def test_normal_floats_are_those_of_bitsandbytes_on_quantised_weights():
    functional = pytest.importorskip("bitsandbytes").functional
    for weight in (rows(64, 96), rows(7, 13, seed=1), 1e-3 * rows(33, 64, seed=2) ** 3):
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(packed, state)
        assert (form_of("nf4")(weight) - theirs).abs().max() == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_those_of_a_model_that_torchao_has_quantised(bits):
    quantization = pytest.importorskip("torchao.quantization")
    net, theirs = linear(rows(24, 64)), linear(rows(24, 64))
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=quantization.PerAxis(0)
    )
    quantization.quantize_(theirs, config)
    (held,), _ = seen(net, f"int{bits}")
    assert (held["weight"] - theirs.weight.dequantize()).abs().max() == 0.0
    with pytest.raises(InputError, match="'weight' is quantised already"):
        compression(theirs, lambda net: 0.0, ["int4"])


@pytest.mark.parametrize("form", ["int3:tensor", "int4:tensor", "fp8"])
def test_one_scale_for_the_tensor_gives_what_torchao_gives_quantised(form):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = rows(24, 64)
    if form == "fp8":
        scale = weight.abs().max() / 448
        theirs = primitives._dequantize_affine_float8(primitives._quantize_affine_float8(weight, scale), scale)
    else:
        bits = int(form[3])
        limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = primitives.choose_qparams_affine(
            weight, primitives.MappingType.SYMMETRIC, weight.shape, torch.int8, *limits
        )
        integers = primitives.quantize_affine(weight, weight.shape, scale, zero, torch.int8, *limits)
        theirs = primitives.dequantize_affine(integers, weight.shape, scale, zero, torch.int8, *limits)
    assert (form_of(form)(weight) - theirs).abs().max() == 0.0
