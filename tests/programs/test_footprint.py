"""The formula of the memory is what the tensors of a training take, on each engine."""

import importlib.util
import itertools
import warnings
from types import SimpleNamespace

import pytest

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.programs.footprint import ENGINES, Footprint, Setup, Sizes, copies_of, size_of
from tests.live import imports_set_aside
from tests.models import MODELS, OPTIMIZERS, closure_of, groups
from tests.processes import run_group
from tests.programs.held import held_by, make_model

METHODS = {
    "k=0": dict(k=0),
    "sam": dict(k=1),
    "multistep": dict(k=3, descent="last"),
    "k=2": dict(k=2, target_parameters="ln_"),
    "k=2, adaptive": dict(k=2, alpha="adaptive", ascent="asam"),
    "k=3, adaptive": dict(k=3, alpha="adaptive"),
}
SETUPS = {
    "plain": {},
    "bf16": dict(mixed_precision="bf16"),
    "stored in bf16": dict(dtype="bfloat16"),
    "frozen": dict(is_frozen=True),
    "momentum": dict(optimizer="momentum"),
    "sgd, accumulation": dict(optimizer="sgd", gradient_accumulation_steps=2),
    "bf16, accumulation": dict(mixed_precision="bf16", gradient_accumulation_steps=2),
}
DEFAULTS = dict(
    dtype="float32",
    mixed_precision="no",
    optimizer="adamw",
    gradient_accumulation_steps=1,
    is_frozen=False,
    layers=2,
)
# every method in the plain setup, every setup with two of the methods
PAIRS = [*itertools.product(METHODS, ["plain"]), *itertools.product(["k=3, adaptive"], SETUPS)]
CASES = {f"{m}; {s}": (METHODS[m], DEFAULTS | SETUPS[s]) for m, s in PAIRS}


def formula(engine, processes, method, setup):
    """Bytes on a device, with the sizes of the measured model."""
    parameters = list(make_model(SimpleNamespace(**setup)).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
    flags = {name: value for name, value in setup.items() if name not in ("is_frozen", "layers")}
    footprint = Footprint(
        engine, Setup(processes=processes, trainable_share=trained, **flags), LookbehindConfig(**method)
    )
    return footprint.on_device(Sizes("tiny", [(p.shape[0], p[0].numel()) for p in parameters]))


@pytest.fixture(scope="module")
def one_process():
    with imports_set_aside(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LookbehindWarning)  # of weights stored in bfloat16
        yield held_by(["alone"], CASES)


@pytest.fixture(scope="module")
def two_processes():
    return run_group(held_by, ["ddp", "fsdp2"], CASES)


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_it_is_what_live_tensors_take(one_process, name):
    assert one_process["alone", name] == pytest.approx(formula("ddp", 1, *CASES[name]), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_in_two_processes_it_is_what_live_tensors_take(two_processes, engine, name):
    for counted in two_processes:
        assert counted[engine, name] == pytest.approx(formula(engine, 2, *CASES[name]), rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="`make test-deepspeed` has DeepSpeed")
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_under_zero_it_is_what_live_tensors_take(engine):
    """Of a model that is deep enough: ZeRO-1 and 2 keep the whole gradient of a tensor that lies in two partitions."""
    names = "k=0; plain", *(f"k=3, adaptive; {s}" for s in ("plain", "bf16", "frozen", "sgd, accumulation"))
    cases = {name: (CASES[name][0], CASES[name][1] | dict(layers=8)) for name in names}
    for counted in run_group(held_by, [engine], cases):
        for name, case in cases.items():
            if engine == "zero2" and name.endswith("sgd, accumulation"):
                continue  # the second copy lives within ZeRO's reduction, where nothing can be counted
            assert counted[engine, name] == pytest.approx(formula(engine, 2, *case), rel=0.02), name


def test_the_copies_are_those_that_the_core_makes():
    model, loss_fn = MODELS["mlp"]()
    for k, descent, alpha in itertools.product(range(4), ["every", "last"], [None, 1, "adaptive"]):
        if descent == "last" and alpha not in (None, 1):
            continue
        for more in ({}, {"ascent": "asam", "offload_buffers": True, "rho": "auto"}):
            config = LookbehindConfig(k=k, descent=descent, alpha=alpha, **more)
            lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), config)
            lookbehind.step(closure_of(model, loss_fn))
            assert sorted(lookbehind._buffers._copies) == sorted(copies_of(config)), config


def test_offloaded_are_the_slow_weights_alone():
    kinds = Footprint("ddp", Setup(), LookbehindConfig(k=3, alpha="adaptive", offload_buffers=True)).kinds
    assert [kind.name for kind in kinds if kind.on_cpu] == ["slow"]


def test_more_processes_take_less_of_each_and_whole_weights_stay():
    def per_parameter(engine, processes):
        footprint = Footprint(engine, Setup(processes=processes, mixed_precision="bf16"), LookbehindConfig(k=2))
        return footprint.on_device(size_of("1M")) / 1e6

    assert {engine: per_parameter(engine, 1000) // 1 for engine in ENGINES} == {
        "ddp": 28, "fsdp2": 0, "zero1": 4, "zero2": 2, "zero3": 0,
    }  # fmt: skip
    for engine in ENGINES[1:]:
        assert per_parameter(engine, 8) < per_parameter(engine, 4)


@pytest.mark.parametrize(
    "engine, mixed_precision, accumulation, counted",
    [
        ("zero1", "no", 1, 16), ("zero1", "no", 2, 16), ("zero1", "bf16", 1, 13), ("zero1", "bf16", 2, 13),
        ("zero2", "no", 1, 14), ("zero2", "no", 2, 16), ("zero2", "bf16", 1, 13), ("zero2", "bf16", 2, 13),
        ("zero3", "no", 1, 12), ("zero3", "no", 2, 12), ("zero3", "bf16", 1, 12), ("zero3", "bf16", 2, 12),
    ],
)  # fmt: skip
def test_under_zero_it_is_what_was_counted(engine, mixed_precision, accumulation, counted):
    """Bytes of live tensors for each parameter: SAM, AdamW, two processes, DeepSpeed 0.19.8; to 2%."""
    setup = Setup(processes=2, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)
    assert Footprint(engine, setup, LookbehindConfig(k=1)).on_device(size_of("1M")) == counted * 10**6


def test_sizes():
    found = {name: size_of(name).parameters for name in ("7B", "0.1b", "350M", "124439808", "1.5K", "1T")}
    assert [*found.values()] == [7 * 10**9, 10**8, 350 * 10**6, 124439808, 1500, 10**12]
    assert [size_of(name) for name in ("user/model-7B", "./7B", "7 B", "-7B", "7G", "")] == [None] * 6


@pytest.mark.parametrize(
    "engine, setup, method, message",
    [
        ("ddp", dict(processes=0), {}, "--processes 0 is not allowed: 1 or more"),
        ("ddp", dict(gradient_accumulation_steps=0), {}, "--gradient_accumulation_steps 0"),
        ("ddp", dict(trainable_share=0.0), {}, r"--trainable_share 0.0 is not allowed: a number in \(0, 1\]"),
        ("ddp", dict(trainable_share=float("nan")), {}, "--trainable_share nan"),
        ("fsdp2", {}, dict(sync_ascent=False), "--sync_ascent False is not supported by --engine fsdp2"),
        ("zero2", dict(dtype="bfloat16"), {}, "--dtype bfloat16 under --engine zero2 needs --mixed_precision"),
    ],
)
def test_what_an_engine_refuses_is_named(engine, setup, method, message):
    with pytest.raises(InputError, match=message):
        Footprint(engine, Setup(**setup), LookbehindConfig(**method))
