"""What the Trainer offers beside training goes on as before: schedules, optimizers, averages, sampling, searches."""

import optuna
import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_utils import HPSearchBackend, SchedulerType

from hf_lookbehind import InputError, LookbehindConfig, LookbehindTrainer
from tests.models import max_difference, weights_of
from tests.training import arguments, images, make_model, make_trainer, train

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)


def lrs(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


# ---- schedules ----

SCHEDULES = {
    "cosine_with_restarts": dict(num_cycles=2),
    "polynomial": dict(power=2.0),
    "cosine_with_min_lr": dict(min_lr=1e-4),
    "cosine_warmup_with_min_lr": dict(min_lr=1e-4),
    "warmup_stable_decay": dict(num_decay_steps=3),
}
# they look at the evaluations
METRIC_SCHEDULES = {"reduce_lr_on_plateau": dict(patience=0, threshold=0.1), "greedy": dict(patience=0, warmup=0)}


@pytest.mark.parametrize("name", [s.value for s in SchedulerType if s.value not in METRIC_SCHEDULES])
def test_a_schedule_advances_once_per_iteration(tmp_path, name):
    options = dict(lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES.get(name, {}), warmup_steps=2, max_steps=5)
    plain = train(tmp_path, **options)
    assert lrs(train(tmp_path, dict(k=2), **options)) == lrs(plain) and len(lrs(plain)) == 5
    assert len(set(lrs(plain))) > 1 or name == "constant"


@pytest.mark.parametrize("name", METRIC_SCHEDULES)
def test_a_schedule_by_metric_advances_once_per_evaluation(tmp_path, name):
    options = dict(
        lr_scheduler_type=name, lr_scheduler_kwargs=METRIC_SCHEDULES[name] | dict(factor=0.5), eval_strategy="steps",
        eval_steps=1, max_steps=4, metric_for_best_model="loss", trainer_kwargs=dict(eval_dataset=images(8)),
    )  # fmt: skip
    plain = train(tmp_path, **options)
    ours = train(tmp_path, NO_PERTURBATION, **options)
    assert max_difference(ours.model, plain.model) == 0.0
    assert lrs(ours) == lrs(plain) and len(set(lrs(plain))) > 1
    assert train(tmp_path, dict(k=5), **options).lr_scheduler.last_epoch == plain.lr_scheduler.last_epoch == 4


# ---- optimizers by name ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_by_name_stay_themselves(tmp_path, optim):
    options = dict(optim=optim, weight_decay=0.1, max_steps=3)
    plain = train(tmp_path, **options)
    assert max_difference(train(tmp_path, NO_PERTURBATION, **options).model, plain.model) == 0.0
    ours = train(tmp_path, dict(k=3, rho=0.1), **options)
    assert lrs(ours) == lrs(plain)
    assert 0 < max_difference(ours.model, plain.model) < float("inf")


# ---- averages of the weights ----


class Average(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = AveragedModel(model, multi_avg_fn=self.function())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.model.update_parameters(model)


@pytest.mark.parametrize(
    ("function", "weight"),
    [(lambda: get_ema_multi_avg_fn(0.9), lambda n: 1 - 0.9), (get_swa_multi_avg_fn, lambda n: 1 / n)],
    ids=["EMA", "SWA"],
)
def test_averages_are_those_of_the_slow_weights(tmp_path, function, weight):
    """Which are read from the checkpoints here."""
    average = Average(function)
    options = dict(max_steps=4, save_strategy="steps", save_steps=1, trainer_kwargs=dict(callbacks=[average]))
    train(tmp_path, dict(k=3, rho=0.2, alpha="adaptive"), **options)
    saved = [weights_of(type(make_model()).from_pretrained(tmp_path / f"checkpoint-{i}")) for i in range(1, 5)]
    expected = saved[0]
    for n, weights in enumerate(saved[1:], 2):
        expected = {name: torch.lerp(mean, weights[name], weight(n)) for name, mean in expected.items()}
    assert max_difference(average.model.module, expected) == 0.0
    assert max_difference(expected, saved[-1]) > 1e-3


# ---- sampling, noise, memory ----


def text_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, attn_implementation="sdpa")
    return GPT2LMHeadModel(GPT2Config(**sizes))


def texts(n=28):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(11, (3 + i % 9,), generator=generator)} for i in range(n)]


def collate(items):
    ids = [item["input_ids"] for item in items]
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)
    return dict(input_ids=pad_sequence(ids, batch_first=True), labels=labels)


class Stream(IterableDataset):
    def __iter__(self):
        yield from texts()


def train_text(tmp_path, config=None, data=None, model=None, **options):
    settings = dict(max_steps=4, trainer_kwargs=dict(data_collator=collate)) | options
    return train(tmp_path, config, model=model or text_model(), data=data or texts(), **settings)


@pytest.mark.parametrize(
    "options",
    [
        dict(train_sampling_strategy="group_by_length", gradient_accumulation_steps=2),
        dict(data=Stream()),
        dict(torch_empty_cache_steps=1),
        dict(neftune_noise_alpha=5.0, gradient_accumulation_steps=2),
    ],
    ids=lambda options: next(iter(options)),
)
def test_on_texts_it_is_the_plain_trainer(tmp_path, options):
    plain = train_text(tmp_path, **options)
    assert max_difference(train_text(tmp_path, NO_PERTURBATION, **options).model, plain.model) == 0.0
    ours = train_text(tmp_path, dict(k=2, rho=0.2), **options)
    assert lrs(ours) == lrs(plain) and all(log["sharpness"] > 0 for log in ours.state.log_history[:-1])


def test_all_passes_of_an_iteration_see_the_same_neftune_noise(tmp_path):
    model, seen = text_model(), []
    model.transformer.drop.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    train_text(
        tmp_path,
        dict(k=3, rho=0),
        model=model,
        neftune_noise_alpha=5.0,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    for passes in (seen[:4], seen[4:]):
        assert len(passes) == 4 and all(x.equal(passes[0]) for x in passes)
    without_noise = text_model().transformer.wte(collate(texts(4))["input_ids"])
    assert seen[0].std() > 5 * without_noise.std()


# ---- hyperparameter search ----


class Trials(TrainerCallback):
    """What each trial starts from, is set to, and ends with."""

    def __init__(self):
        self.starts, self.ends, self.configs, self.alphas = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.starts.append(weights_of(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.ends.append(weights_of(model))
        self.configs.append(self.trainer.lookbehind_config)
        self.alphas.append(state.log_history[0]["alpha"])


def search_trainer(tmp_path, config, **options):
    trials = Trials()
    trials.trainer = LookbehindTrainer(
        model_init=lambda: make_model(), args=arguments(tmp_path, max_steps=2, **options), train_dataset=images(),
        eval_dataset=images(8), callbacks=[trials], lookbehind_config=LookbehindConfig(**config),
    )  # fmt: skip
    return trials


def search(trials, grid, space):
    sampler = optuna.samplers.GridSampler(grid, seed=0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return trials.trainer.hyperparameter_search(
        hp_space=space, n_trials=len(next(iter(grid.values()), [0])), backend="optuna", sampler=sampler
    )


def trained_alone(tmp_path, config, **options):
    """The weights and the evaluation of one training of its own."""
    trials = search_trainer(tmp_path, config, **options)
    trials.trainer.train()
    return trials.ends[0], trials.trainer.evaluate()["eval_loss"]


def test_a_search_over_the_trainers_settings(tmp_path):
    grid = {"learning_rate": [1e-3, 2e-2]}
    trials = search_trainer(tmp_path, dict(k=2, rho=0.1))
    best = search(trials, grid, lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1)})
    alone = {lr: trained_alone(tmp_path, dict(k=2, rho=0.1), learning_rate=lr)[1] for lr in grid["learning_rate"]}
    assert best.hyperparameters == {"learning_rate": min(alone, key=alone.get)}
    assert best.objective == min(alone.values())
    assert len(trials.starts) == 2 and all(max_difference(w, make_model()) == 0.0 for w in trials.starts)
    assert all(config == LookbehindConfig(k=2, rho=0.1) for config in trials.configs)


def test_a_search_over_settings_of_ours_beside_the_trainers(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *_: warned.append(message))
    trials = search_trainer(tmp_path, dict(k=1, rho=0.5, ascent="asam"))
    search(
        trials,
        {"k": [2, 3], "learning_rate": [2e-2]},
        lambda trial: {
            "k": trial.suggest_int("k", 1, 5),
            "rho": 0.1,
            "alpha": 0.7,
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1),
        },
    )
    assert sorted(config.k for config in trials.configs) == [2, 3] and trials.alphas == pytest.approx([0.7] * 2)
    for config, end in zip(trials.configs, trials.ends, strict=True):
        expected = dict(k=config.k, rho=0.1, alpha=0.7, ascent="asam")
        assert config == LookbehindConfig(**expected)
        assert max_difference(end, trained_alone(tmp_path, expected, learning_rate=2e-2)[0]) == 0.0
    assert not [message for message in warned if "corresponding field" in message]


def test_a_value_that_is_not_allowed_ends_the_search(tmp_path):
    trials = search_trainer(tmp_path, dict(k=1))
    with pytest.raises(InputError, match="rho=-1"):
        search(trials, {}, lambda trial: {"rho": -1})
    assert trials.starts == []


@pytest.mark.parametrize("backend", [HPSearchBackend.RAY, HPSearchBackend.WANDB])
def test_trials_that_are_mappings_set_the_same(tmp_path, backend):
    trainer = make_trainer(tmp_path, dict(k=1, ascent="asam"))
    trainer.hp_search_backend, trainer.hp_space = backend, None
    trial = {"k": 3, "alpha": "adaptive", "learning_rate": 0.5}
    trainer._hp_search_setup(trial)
    assert trainer.lookbehind_config == LookbehindConfig(k=3, alpha="adaptive", ascent="asam")
    assert trainer.args.learning_rate == 0.5 and not hasattr(trainer.args, "alpha")
    assert trial == {"k": 3, "alpha": "adaptive", "learning_rate": 0.5} and trainer.hp_space is None
