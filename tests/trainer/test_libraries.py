"""Under the mixin, the trainers of TRL and sentence-transformers stay what they are."""

import itertools

import pytest
import torch
from transformers import TrainerCallback

from hf_lookbehind import InputError, LookbehindConfig
from hf_lookbehind.trainer.trained import trained_module
from tests.libraries import CASES, make_library_trainer
from tests.models import max_difference, weights_of
from tests.walk import differing, numbers

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)
# Those of a kind that another case has too are slow.
ALIKE = {"dpo-bema", "dpo-lora", "orpo", "kto-experimental", "sparse", "multi-vector"}
each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ALIKE else ()) for case in CASES]
)
OURS = {"sharpness", "alpha", "ascent_loss", "ascent_norm"}


def train(case, folder, config=None, **overrides):
    trainer = make_library_trainer(case, folder, config, **overrides)
    trainer.train()
    return trainer


def logs_of(trainer):
    """What was logged, without times and what Lookbehind adds."""
    is_timed = ("runtime", "per_second")
    return [
        {name: value for name, value in log.items() if name not in OURS and not any(t in name for t in is_timed)}
        for log in trainer.state.log_history
    ]


@each_case
def test_no_perturbation_is_the_library_s_own_trainer(tmp_path, case):
    plain, ours = (train(case, tmp_path / str(i), config) for i, config in enumerate([None, NO_PERTURBATION]))
    assert max_difference(trained_module(ours), trained_module(plain)) == 0.0
    assert logs_of(ours) == logs_of(plain)
    assert max_difference(ours.model, make_library_trainer(case, tmp_path / "2").model) > 1e-3


@each_case
def test_extra_passes_leave_no_trace(tmp_path, case):
    """With no step and no perturbation all passes are alike: nothing at all may differ from the plain trainer."""
    still = dict(learning_rate=0.0, weight_decay=0.0)
    plain, ours = (train(case, tmp_path / "run", config, **still) for config in (None, dict(k=3, rho=0)))
    assert logs_of(ours) == logs_of(plain)
    theirs, mine = numbers(vars(plain)), numbers(vars(ours))
    added = (".lookbehind_config", ".transform_gradient", "._window", "._skipped")
    assert [path for path in differing(theirs, mine) if not path.startswith(added)] == []
    assert len(theirs) > 500 and any(path.endswith(".last_epoch") for path in theirs)


def test_the_walker_finds_a_counter(tmp_path):
    from trl import SFTTrainer

    original, calls = SFTTrainer.compute_loss, itertools.count(1)

    def counting(self, *args, **kwargs):
        self.state.seen = {"batches": [next(calls)]}
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", counting)
        plain, ours = (numbers(vars(train("sft", tmp_path, config))) for config in (None, dict(k=3, rho=0)))
    assert ".state.seen.batches.0" in differing(plain, ours)


@pytest.mark.parametrize("case", ["sft-lora", pytest.param("dpo", marks=pytest.mark.slow), "sentence-classifier"])
def test_a_perturbed_run_climbs_and_is_resumed_exactly(tmp_path, case):
    config = dict(k=3, rho=0.05, ascent="asam", alpha="adaptive")
    whole = train(case, tmp_path / "a", config, max_steps=4)
    assert all(log["sharpness"] > 0 for log in whole.state.log_history[:-1])
    if case == "sentence-classifier":
        return  # its checkpoints do not hold the loss's own weights
    train(case, tmp_path / "b", config, max_steps=4, save_strategy="steps", save_steps=2)
    resumed = make_library_trainer(case, tmp_path / "b", config, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    assert max_difference(resumed.model, whole.model) == 0.0


def test_sentence_transformers_resumes_exactly_and_saves_the_settings(tmp_path):
    config = dict(k=2, rho=0.05)
    whole = train("sentence", tmp_path / "a", config, max_steps=4)
    train("sentence", tmp_path / "b", config, max_steps=4, save_strategy="steps", save_steps=2)
    resumed = make_library_trainer("sentence", tmp_path / "b", config, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert LookbehindConfig.load(tmp_path / "b" / "out" / "checkpoint-2").k == 2
    assert max_difference(resumed.model, whole.model) == 0.0


class Perturbed(TrainerCallback):
    """Which weights a forward sees moved."""

    def __init__(self, trainer):
        self.trained = trained_module(trainer)
        self.moved = set()
        self.slow = weights_of(self.trained)
        trainer.model.register_forward_pre_hook(self.look)

    def look(self, *_):
        now = weights_of(self.trained)
        self.moved |= {name for name in now if not torch.equal(now[name], self.slow[name])}

    def on_step_end(self, *_, **__):
        self.slow = weights_of(self.trained)


def test_the_weights_of_a_loss_are_perturbed_under_their_own_name(tmp_path):
    def moved_by(**config):
        trainer = make_library_trainer("sentence-classifier", tmp_path, dict(k=1, **config))
        watch = Perturbed(trainer)
        trainer.add_callback(watch)
        trainer.train()
        return watch.moved

    assert {"loss.classifier.weight", "loss.classifier.bias"} < moved_by()
    assert moved_by(target_parameters=r"^loss\.classifier") == {"loss.classifier.weight", "loss.classifier.bias"}
    with pytest.raises(InputError, match="target_parameters.*matches no trainable parameter"):
        moved_by(target_parameters="loss.model")


def test_weights_beside_the_model_are_refused_in_several_processes(tmp_path):
    trainer = make_library_trainer("sentence-classifier", tmp_path)
    trainer.args.__dict__["world_size"] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.args), "world_size", 2)
        with pytest.raises(InputError, match=r"beside the model \(loss\.classifier\.weight\).* in 2 processes"):
            trained_module(trainer)
