"""Flags: what is refused and how, settings from files, help."""

import json
import re
from dataclasses import fields

import pytest

from hf_lookbehind.config import InputError, LookbehindConfig
from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.programs.cli.paths import resume_from
from hf_lookbehind.scripts.run_image_classification import make_parser


@pytest.fixture(scope="module")
def parser():
    return FlagParser(description="Examples:\n    program --k 2")


@pytest.fixture
def parse(parser, tmp_path):
    def parse(*argv):
        return parser.parse([*argv, "--output_dir", str(tmp_path / "out")])

    return parse


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], LookbehindConfig()),
        (["--k", "5", "--rho", "0.1"], LookbehindConfig(k=5, rho=0.1)),
        (["--rho=1e-3", "--alpha", "0.5"], LookbehindConfig(rho=1e-3, alpha=0.5)),
        (["--alpha", "adaptive-global", "--ascent", "asam"], LookbehindConfig(alpha="adaptive-global", ascent="asam")),
        (["--target_parameters", "weight", "^vit"], LookbehindConfig(target_parameters=["weight", "^vit"])),
        (["--no_sync_ascent"], LookbehindConfig(sync_ascent=False)),
        (["--sync-ascent", "false"], LookbehindConfig(sync_ascent=False)),
        (["--k", "3", "--descent", "last", "--alpha", "1"], LookbehindConfig(k=3, descent="last", alpha=1)),
    ],
)
def test_lookbehind_flags_make_the_config(parse, flags, expected):
    assert parse(*flags).lookbehind == expected


@pytest.mark.parametrize("name", [f.name for f in fields(LookbehindConfig)])
def test_every_field_of_the_config_has_a_flag_and_its_help(parser, name):
    action = parser._option_string_actions[f"--{name}"]
    field = next(f for f in fields(LookbehindConfig) if f.name == name)
    # a k that is given can be told from the default
    default = f" Default: {field.default}." if name == "k" else ""
    assert action.help == field.metadata["help"] + default
    assert action.default == (None if name == "k" else field.default)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", "-1"], "--k=-1 is not allowed"),
        (["--k", "1.5"], "--k=1.5 is not allowed"),
        (["--k", "two"], "--k='two' is not allowed"),
        (["--rho", "-1e-3"], "--rho=-0.001 is not allowed"),
        (["--rho", "-inf"], "--rho=-inf is not allowed"),
        (["--rho", "large"], "--rho='large' is not allowed"),
        (["--rho_scale", "0"], "--rho_scale=0 is not allowed"),
        (["--alpha", "foo"], "--alpha='foo' is not allowed"),
        (["--ascent", "up"], "--ascent='up' is not allowed"),
        (["--sync_ascent", "perhaps"], "--sync_ascent"),
        (["--descent", "last", "--alpha", "adaptive"], "--alpha='adaptive' is not allowed"),
        (["--k"], "--k: expected one argument"),
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--optim", "fastest"], "--optim: invalid choice: 'fastest' (choose from 'adamw_torch'"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--lerning_rate", "1"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
        (["--lerning-rate", "1"], "unknown flag --lerning-rate: did you mean --learning_rate?"),
        (["--group_by_length"], "--group_by_length: it is now --train_sampling_strategy group_by_length"),
        (["--eval_accumulation_steps", "0"], "--eval_accumulation_steps 0 is not allowed: 1 or more"),
        (["--save_total_limit", "0"], "--save_total_limit 0 is not allowed: 1 or more"),
        (["--save_steps", "-5"], "--save_steps -5.0 is not allowed: 0 or more"),
        (["--eval_delay", "nan"], "--eval_delay nan is not allowed: 0 or more"),
        (["--warmup_steps", "nan"], "--warmup_steps nan is not allowed: a finite number, 0 or more"),
        (["--neftune_noise_alpha", "inf"], "--neftune_noise_alpha inf is not allowed: a finite number"),
        (["--learn", "1"], "unknown flag --learn: did you mean --learning_rate?"),
        (["-k", "1"], "unknown flag -k"),
        (["--trust_remote_code"], "unknown flag --trust_remote_code"),
        (["stray"], "unexpected argument before the first flag"),
        (["--k", "1_0"], "--k='1_0' is not allowed"),
        (["--max_steps", "0"], "--max_steps 0 is not allowed"),
        (["--max_steps", "-2"], "--max_steps -2 is not allowed"),
        (["--seed", "4294967296"], "--seed 4294967296 is not allowed"),
        (["--data_seed", "4294967296"], "--data_seed 4294967296 is not allowed"),
        (["--model_name_or_path", "./" + "x" * 300], "there is no such model folder"),
        (["--hub_always_push"], "--hub_always_push is not supported"),
        (["--hub_model_id", "user/model"], "--hub_model_id needs --push_to_hub"),
        (["--hub_token", "hf_secret"], "--hub_token needs --push_to_hub"),
        (["--push_to_hub", "--hub_strategy", "checkpoint"], "--hub_strategy checkpoint is not supported"),
        (["--push_to_hub", "--hub_deadline", "0"], "--hub_deadline 0.0 is not allowed"),
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "--hub_model_id 'a/b/c' is not the name of a repository"),
        (["--learning_rate", "nan"], "--learning_rate nan is not allowed"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 is not allowed: 1 or more"),
        (["--num_train_epochs", "-1"], "--num_train_epochs -1.0 is not allowed: more than 0"),
        (["--warmup_steps", "-1"], "--warmup_steps -1.0 is not allowed"),
        (["--lr_scheduler_kwargs", "{x"], "--lr_scheduler_kwargs '{x' is not JSON"),
        (["--load_best_model_at_end"], "requires the save and eval strategy to match"),
        (["--early_stopping_patience", "1"], "--early_stopping_patience needs --load_best_model_at_end"),
        (["--early_stopping_threshold", "1"], "--early_stopping_threshold needs --early_stopping_patience"),
        (["--lookahead_steps", "-1"], "--lookahead_steps -1 is not allowed: 0 or more"),
        (["--lookahead_alpha", "0.5"], "--lookahead_alpha needs --lookahead_steps"),
        (["--lookahead_steps", "5", "--k", "1", "--lookahead_alpha", "1"], "--lookahead_alpha 1.0 is not allowed"),
        (["--lookahead_steps", "5"], "--lookahead_steps 5 is not allowed with --k 2 and alpha 0.5"),
        (["--train_val_split", "1"], "--train_val_split 1.0 is not allowed"),
        (["--max_train_samples", "0"], "--max_train_samples 0 is not allowed"),
        (["--model_name_or_path", "/nowhere"], "--model_name_or_path '/nowhere': there is no such model folder"),
        (["--config_name", "/nowhere"], "--config_name '/nowhere': there is no such model folder"),
        (["--dataset_name", "./nowhere"], "--dataset_name './nowhere': there is no such folder"),
        (["--model_name_or_path", "x", "--config_overrides", "a=1"], "--config_overrides is for a new model"),
        (["--resume_from_checkpoint", "last"], "holds no complete checkpoint"),
        (["--resume_from_checkpoint", "/nowhere"], "--resume_from_checkpoint '/nowhere' is no complete"),
    ],
)
def test_bad_flags_are_refused_by_name_and_nothing_is_written(parse, tmp_path, flags, message):
    with pytest.raises(InputError) as refused:
        parse(*flags)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tokn=hf_secret"], "unknown flag --tokn"),
        (["--token=", "hf_secret"], "after --token:"),
        (["--k", "1", "--token", "hf_public", "hf_secret", "--rho", "1"], "after --token:"),
        (["hf_secret"], "before the first flag"),
        (["token: [hf_1, hf_secret]"], "after --token:"),
        (["token: [hf_secret"], "cannot be read: expected ',' or ']'"),
        (["token: hf_secret\nk: @"], "cannot be read: found character '@'"),
    ],
)
def test_a_value_that_might_be_a_secret_is_not_repeated(parse, tmp_path, flags, message):
    if "token: " in flags[0]:
        (tmp_path / "settings.yaml").write_text(flags[0])
        flags = [str(tmp_path / "settings.yaml")]
    with pytest.raises(InputError) as refused:
        parse(*flags)
    assert message in str(refused.value) and "hf_" not in str(refused.value).replace(str(tmp_path), "")


def test_lookbehinds_flags_are_checked_before_files(parse):
    with pytest.raises(InputError, match="--k"):
        parse("--model_name_or_path", "/nowhere", "--k", "-1")


@pytest.mark.parametrize(
    "where, message",
    [
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("/proc/nowhere/out", "is not writable"),
        ("x" * 300, "no file can have such a name"),
        ("nowhere/" + "x" * 300, "no file can have such a name"),
        ("a\0b", "no file can have such a name"),
    ],
)
def test_an_output_dir_that_cannot_be_made_is_refused(parser, tmp_path, where, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"--output_dir .*{message}"):
        parser.parse(["--output_dir", str(tmp_path / where)])


@pytest.mark.parametrize("name", ["", " "])
def test_an_output_dir_needs_a_name(parser, name):
    with pytest.raises(InputError, match="--output_dir ' ?' is not allowed"):
        parser.parse(["--output_dir", name])


@pytest.mark.parametrize("flag", ["model_name_or_path", "config_name", "dataset_name"])
def test_an_output_dir_that_is_read_is_refused(parser, tmp_path, flag):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(InputError, match=f"it is the folder of --{flag}"):
        parser.parse([f"--{flag}", str(tmp_path), "--output_dir", f"{tmp_path}/below/.."])


def test_adapters_alone_are_no_model(parse, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="--model_name_or_path .* holds adapters only: .*merge_and_unload"):
        parse("--model_name_or_path", str(tmp_path / "adapters"))


def test_an_output_dir_with_checkpoints_is_refused_unless_training_continues(parser, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    with pytest.raises(InputError, match="already holds checkpoint-3.*--resume_from_checkpoint last"):
        parser.parse(["--output_dir", str(tmp_path)])
    resumes = [["--output_dir", str(tmp_path), "--resume_from_checkpoint", name] for name in ("last", str(checkpoint))]
    for content in (None, "", '{"global_'):
        if content is not None:
            (checkpoint / "trainer_state.json").write_text(content)
        for resume in resumes:
            with pytest.raises(InputError, match="no complete checkpoint"):
                parser.parse(resume)
    (checkpoint / "trainer_state.json").write_text("{}")
    for resume in resumes:
        parser.parse(resume)


@pytest.mark.parametrize(
    "given, resumed",
    [(None, None), ("false", None), ("last", True), ("True", True), ("out/checkpoint-3", "out/checkpoint-3")],
)
def test_resume_from(given, resumed):
    assert resume_from(given) == resumed


SETTINGS = {
    "k": 5,
    "rho": "1e-2",
    "learning_rate": 0.01,
    "target_parameters": ["weight", "bias"],
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "sync_ascent": True,
    "data_seed": None,
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_settings_come_from_a_file_and_flags_override(parse, tmp_path, suffix):
    path = tmp_path / f"settings{suffix}"
    path.write_text(json.dumps(SETTINGS))  # JSON is YAML
    arguments = parse(str(path), "--k", "3")
    assert arguments.lookbehind == LookbehindConfig(k=3, rho=0.01, target_parameters=["weight", "bias"])
    assert arguments.training.learning_rate == 0.01
    assert arguments.training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("nothing", ["no", "off", "False"])
def test_no_in_a_file_means_what_the_flag_calls_nothing(tmp_path, suffix, nothing):
    names = ["save_strategy", "eval_strategy", "logging_strategy", "augmentation", "corruption", "report_to", "bf16"]
    path = tmp_path / f"settings{suffix}"
    settings = "\n".join(f"{name}: {nothing}" for name in names)
    path.write_text(json.dumps(dict.fromkeys(names, False)) if suffix == ".json" else settings)
    args = make_parser().parse([str(path), "--dataset_name", "digits", "--output_dir", str(tmp_path / "out")])
    found = {name: getattr(args.training, name, None) or getattr(args.data, name, None) for name in names}
    assert found == dict.fromkeys(names, "no") | dict(
        augmentation="none", corruption="none", report_to=None, bf16=None
    )


def test_values_in_a_file_are_what_is_written_there(parser, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "run_name: no\nlength_column_name: 1.10\ndataset_config_name: 010\nlearning_rate: 1e-4\nrho: &rho 1e-2\n"
        "weight_decay: *rho\nmetric: [on, 2020-01-01]\nuse_cpu: on\ndata_seed: null\nresume_from_checkpoint: off\n"
        "lr_scheduler_kwargs: {min_lr: 1e-5, deep: {flag: yes}}\n"
    )
    args = parser.parse([str(path), "--output_dir", str(tmp_path / "out")])
    training = args.training
    assert (training.run_name, training.length_column_name) == ("no", "1.10")
    assert (args.data.dataset_config_name, training.metric) == ("010", ["on", "2020-01-01"])
    assert (training.learning_rate, args.lookbehind.rho, training.weight_decay) == (1e-4, 1e-2, 1e-2)
    assert training.use_cpu and training.data_seed is None and resume_from(training.resume_from_checkpoint) is None
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5, "deep": {"flag": True}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("k: 2\nk: 3\n", "settings.yaml holds 'k' twice"),
        ("save_strategy: yes\n", "--save_strategy/--save-strategy: invalid choice: 'yes'"),
        ("report_to: [\n", "cannot be read"),
        ("k: 2\nrhoo: 1\n", "unknown settings: 'rhoo': did you mean rho?"),
        ("- k\n", "must hold settings as 'name: value', not a list"),
        ("k: [2\n", "cannot be read"),
        ("k: -2\n", "--k=-2 is not allowed"),
    ],
)
def test_bad_files_of_settings_are_refused(parse, tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        parse(str(path))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_of_settings_is_named(parse):
    with pytest.raises(InputError, match="nowhere.yaml: there is no such file"):
        parse("nowhere.yaml")


def test_a_bare_name_is_looked_up_among_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = make_parser()
    assert parser.parse(["vit_digits.yaml"]).data.dataset_name == "digits"
    (tmp_path / "vit_digits.yaml").write_text("train_dir: .")
    assert parser.parse(["vit_digits.yaml"]).data.dataset_name is None
    assert parser.parse(["sam.yaml"]).lookbehind == parser.parse(["papers/sam.yaml"]).lookbehind
    # those of accelerate are no settings of a program
    for name in ("./nowhere/vit_digits.yaml", "papers/vit_digits.yaml", "accelerate/ddp.yaml", "ddp.yaml"):
        with pytest.raises(InputError, match="there is no such file"):
            parser.parse([name])


def test_a_folder_that_contains_the_working_directory_is_not_pushed(parser, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", str(tmp_path), ".."):
        with pytest.raises(InputError, match="--output_dir .* cannot be pushed: it contains the working directory"):
            parser.parse(["--push_to_hub", "--output_dir", folder])
    assert parser.parse(["--push_to_hub", "--output_dir", "out"]).hub.repo_id == "out"


def test_the_trainer_is_told_nothing_of_the_hub(parse):
    args = parse(
        "--push_to_hub", "--hub_model_id", "user/model", "--hub_token", "hf_canary", "--hub_private_repo", "true"
    )
    assert (args.hub.repo_id, args.hub.token, args.hub.private) == ("user/model", "hf_canary", True)
    assert not args.training.push_to_hub and args.training.hub_model_id is None
    assert "hf_canary" not in repr(vars(args.training)) and "hf_canary" not in repr(args)


def test_help_is_grouped_and_starts_with_the_examples(parser):
    text = parser.format_help()
    heads = [text.index(head) for head in ("    program --k 2", "\nData:", "\nModel:", "\nLookbehind:", "\nTraining")]
    assert heads == sorted(heads)
    assert "--learning_rate" in text and "--learning-rate" not in text and "--hub_always_push" not in text


def test_help_shows_what_most_need_and_help_all_the_rest(parser, capsys):
    short, whole = parser.format_help(), parser.format_help(everything=True)
    assert "--ddp_backend" in whole and "--ddp_backend" not in short and "--lookahead_steps" in short
    assert len(short) < len(whole) / 2 and re.search(r"--help-all: and \d+ more of TrainingArguments\n$", short)
    with pytest.raises(SystemExit) as end:
        parser.parse_known_args(["--help-all"])
    assert end.value.code == 0 and capsys.readouterr().out == whole


def test_the_best_model_is_chosen_by_the_metric(parse):
    best = ["--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch"]

    def chosen(*flags, keys=("accuracy", "perplexity")):
        training = parse(*flags).training
        training.choose_best_metric(keys)
        return training.metric_for_best_model, training.greater_is_better

    assert chosen(*best) == ("accuracy", True)
    assert chosen(*best, keys=["perplexity"]) == ("perplexity", False)
    assert chosen(*best, "--metric_for_best_model", "loss") == ("loss", False)
    assert chosen(*best, "--metric_for_best_model", "eval_perplexity") == ("eval_perplexity", False)
    assert chosen(*best, "--metric_for_best_model", "accuracy", "--greater_is_better", "false") == ("accuracy", False)
    with pytest.raises(InputError, match="--metric_for_best_model 'f1' is not reported: allowed are loss, accuracy"):
        chosen("--metric_for_best_model", "f1")


def test_the_token_is_not_shown(parse):
    arguments = parse("--token", "hf_secret")
    assert arguments.model.token == "hf_secret" and "hf_secret" not in repr(arguments)
