"""`--method`: a word for settings, and for what makes the updates of others at fewer gradients."""

import json

import pytest
from safetensors.torch import load_file

from hf_lookbehind import InputError, LookbehindConfig
from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.scripts.run_image_classification import train


@pytest.fixture(scope="module")
def parser():
    return FlagParser()


@pytest.fixture
def parse(parser, tmp_path):
    return lambda *argv: parser.parse([*argv, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--method plain --rho 0.1", LookbehindConfig(k=0, rho=0.1)),
        ("--method sam --ascent asam", LookbehindConfig(k=1, alpha=1, ascent="asam")),
        ("--method sam --k 1", LookbehindConfig(k=1, alpha=1)),
        ("--method lookbehind --k 5", LookbehindConfig(k=5)),
        ("--method matched --k 5 --rho 0.02", LookbehindConfig(k=1, rho=0.06, alpha=1.0)),
        ("--method matched", LookbehindConfig(k=1, rho=0.03, alpha=1.0)),
    ],
)
def test_a_word_stands_for_settings(parse, flags, expected):
    assert parse(*flags.split()).lookbehind == expected


@pytest.mark.parametrize("spelling", [["--method", "plain"], ["--method=plain"]])
def test_a_method_overrides_what_a_file_says_of_it(parse, tmp_path, spelling):
    file = tmp_path / "settings.yaml"
    file.write_text("k: 2\nrho: 0.1\n", encoding="utf-8")
    assert parse(str(file), *spelling).lookbehind == LookbehindConfig(k=0, rho=0.1)
    with pytest.raises(InputError, match="--k 2 is not allowed with --method plain"):
        parse(str(file), *spelling, "--k", "2")


def test_a_match_has_the_learning_rate_and_the_betas_too(parse):
    args = parse(*"--method matched --k 2 --alpha 0.25 --learning_rate 1e-3 --adam_beta1 0.8 --adam_beta2 0.9".split())
    assert args.matches == LookbehindConfig(k=2, alpha=0.25)
    training = args.training
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (5e-4, 0.8**2, 0.9**2)


def test_of_sgd_the_momentum_and_what_it_sums_to(parse):
    flags = "--method matched --k 2 --alpha 1 --optim sgd --learning_rate 0.1 --optim_args"
    training = parse(*flags.split(), "momentum=0.5, weight_decay=0.1").training
    assert training.optim_args == "momentum=0.25,weight_decay=0.1"
    assert training.learning_rate == pytest.approx(0.1 * 2 * (1 - 0.25) / (1 - 0.5))
    assert parse(*flags.split()[:-1]).training.learning_rate == pytest.approx(0.2)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method sam --k 5", "--k 5 is not allowed with --method sam, which sets it to 1"),
        ("--method sam --alpha 0.5", "--alpha 0.5 is not allowed with --method sam"),
        ("--method plain --k 2", "--k 2 is not allowed with --method plain, which sets it to 0"),
        ("--method matched --alpha adaptive", "--method matched: --alpha='adaptive' is not allowed: a number"),
        ("--method matched --k 0", "--method matched: --k=0 is not allowed"),
        (
            "--method matched --optim adafactor",
            "--optim adafactor is not allowed with --method matched: sgd, or one of",
        ),
        ("--method matched --optim sgd --optim_args nesterov=true,momentum=0.9", "--optim_args nesterov=true is not"),
        ("--method matched --rho_search grid", "--rho_search is not allowed with --method matched"),
        ("--method matched --lookahead_steps 5", "--lookahead_steps is not allowed with --method matched"),
        ("--method best", "argument --method: invalid choice: 'best'"),
    ],
)
def test_what_does_not_go_together_is_refused(parse, flags, message):
    with pytest.raises(InputError) as error:
        parse(*flags.split())
    assert message in str(error.value)


def test_it_trains_nearly_as_lookbehind_does_and_its_card_says_so(tmp_path):
    flags = (
        "--dataset_name digits --train_split train[:64] --train_val_split 0 --augmentation none --max_steps 4 "
        "--optim sgd --learning_rate 0.02 --config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2,"
        "intermediate_size=16,initializer_range=0.2 --rho 0.02 --lr_scheduler_type constant"
    ).split()
    weights = {}
    for name, method in (
        ("lookbehind", ["--k", "2"]),
        ("matched", ["--k", "2", "--method", "matched"]),
        ("sam", ["--method", "sam"]),
    ):
        train([*flags, "--alpha", "1", *method, "--output_dir", str(tmp_path / name)])
        weights[name] = load_file(tmp_path / name / "model.safetensors")

    def apart(one, other):
        return sum(((weights[one][name] - w) ** 2).sum() for name, w in weights[other].items()) ** 0.5

    assert apart("matched", "lookbehind") < apart("sam", "lookbehind") / 20
    assert json.loads((tmp_path / "matched" / "lookbehind_config.json").read_text())["k"] == 1
    card = (tmp_path / "matched" / "README.md").read_text()
    assert "matched to Lookbehind" in card and "k=2, rho=0.02, alpha=1, 2 times its learning rate" in card
    assert "--method matched" in card
