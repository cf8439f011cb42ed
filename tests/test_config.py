import dataclasses
import json

import numpy as np
import pytest

from hf_lookbehind import InputError, LookbehindConfig

BAD = [
    ("k", -1), ("k", 1.5), ("k", True), ("k", "2"), ("k", None),
    ("rho", -0.1), ("rho", float("nan")), ("rho", float("inf")), ("rho", "big"), ("rho", True),
    ("rho_scale", 0), ("rho_scale", -1), ("rho_scale", float("inf")), ("rho_scale", "x"),
    ("alpha", 0), ("alpha", 1.5), ("alpha", -0.5), ("alpha", "foo"), ("alpha", float("nan")), ("alpha", True),
    ("ascent", "gsam"), ("ascent", None), ("eta", -1), ("eta", float("inf")), ("eta", "x"),
    ("descent", "first"), ("target_parameters", "("), ("target_parameters", []), ("target_parameters", [""]),
    ("target_parameters", 3), ("target_parameters", ["a", 3]), ("sync_ascent", "yes"), ("offload_buffers", 1),
    ("ascent_fraction", 0), ("ascent_fraction", 2), ("ascent_every", 0), ("ascent_every", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("k", [0, 2])
def test_bad_value_names_field_value_and_what_is_allowed(name, value, k):
    with pytest.raises(InputError, match=name) as error:
        LookbehindConfig(**({"k": k} | {name: value}))
    shown = value[0] if isinstance(value, list) and len(value) == 1 and value != [""] else value
    assert repr(shown) in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("alpha", [0.5, "adaptive", "adaptive-global"])
def test_one_descent_has_no_alpha_to_choose(alpha):
    with pytest.raises(InputError, match="descent='last'"):
        LookbehindConfig(descent="last", alpha=alpha)


@pytest.mark.parametrize(
    ("settings", "alpha", "rho"),
    [
        (dict(), 0.5, 0.02),
        (dict(k=5), 0.2, 0.02),
        (dict(k=5, ascent="asam"), 0.2, 0.5),
        (dict(k=5, descent="last"), 1.0, 0.02),
        (dict(k=1), 1.0, 0.02),
        (dict(k=0), 1.0, 0.02),
        (dict(k=0, alpha=0.5), 1.0, 0.02),
        (dict(k=1, alpha="adaptive"), 1.0, 0.02),
        (dict(k=1, alpha=0.5), 0.5, 0.02),
        (dict(k=2, alpha="adaptive", rho=0.1), "adaptive", 0.1),
    ],
)
def test_defaults_are_resolved(settings, alpha, rho):
    resolved = LookbehindConfig(**settings).resolved()
    assert (resolved.alpha, resolved.rho) == (alpha, rho)
    assert resolved.resolved() == resolved


def test_replace_does_not_keep_another_ks_alpha():
    assert dataclasses.replace(LookbehindConfig(k=2), k=5).resolved().alpha == 0.2


def test_config_is_frozen_and_hashable():
    config = LookbehindConfig(target_parameters=["a", "b"])
    assert hash(config) == hash(LookbehindConfig(target_parameters=("a", "b")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3


def test_json_round_trip(tmp_path):
    config = LookbehindConfig(k=np.int64(3), rho=np.float32(0.5), alpha="adaptive", target_parameters="norm")
    assert LookbehindConfig.from_json(config.to_json()) == config
    assert json.loads(LookbehindConfig().to_json())["alpha"] is None
    assert config.save(tmp_path).name == "lookbehind_config.json"
    assert LookbehindConfig.load(tmp_path) == config


def test_unknown_json_keys_are_named():
    with pytest.raises(InputError, match="'roh'.*'steps'"):
        LookbehindConfig.from_json('{"k": 2, "steps": 3, "roh": 0.1}')
    with pytest.raises(InputError, match="not JSON"):
        LookbehindConfig.from_json("{")
    with pytest.raises(InputError, match="JSON object"):
        LookbehindConfig.from_json("[1]")


def test_differences_compare_what_defaults_stand_for():
    assert LookbehindConfig(k=2).differences(LookbehindConfig(k=2, alpha=0.5)) == []
    assert LookbehindConfig(k=2).differences(LookbehindConfig(k=4)) == ["k", "alpha"]


@pytest.mark.parametrize(
    "settings, passes",
    [
        (dict(k=0, ascent_every=3), 10),
        (dict(k=5), 60),
        (dict(k=3, descent="last"), 40),
        (dict(k=1, ascent_fraction=0.125), 11.25),
        (dict(k=2, ascent_every=3), 4 * 3 + 6),
        (dict(k=2, ascent_every=3, ascent_fraction=0.5), 4 * 2.5 + 6),
    ],
)
def test_the_cost_of_ten_steps(settings, passes):
    assert LookbehindConfig(**settings).gradient_passes(10) == passes
