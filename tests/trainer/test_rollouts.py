"""Trainers that generate stay what they are: they prepare once per iteration, and all passes meet it."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOTrainer

from hf_lookbehind import InputError, LookbehindConfig, LookbehindMixin
from hf_lookbehind.trainer import private
from hf_lookbehind.trainer.support import refuse_unsupported
from hf_lookbehind.trainer.window import Window
from tests.generating import CASES, logs_of, make_generating_trainer, train
from tests.models import max_difference, weights_of
from tests.walk import differing, numbers

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)
CLIMBING = dict(k=3, rho=0.05)
QUICK = {"grpo"}
NOT_GENERATING = {"cpo", "tpo"}
ADAPTIVE_ENTROPY = dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=3.0)
# Settings of GRPO, each of which takes another way through its preparation or its loss.
SETTINGS = {
    "accumulation 1": dict(gradient_accumulation_steps=1),
    "a generation between two losses": dict(steps_per_generation=1),
    "a generation for two steps": dict(steps_per_generation=4, max_steps=4),
    "mu 2": dict(num_iterations=2, max_steps=4),
    "beta": dict(beta=0.1),
    "beta, reference synced": dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1),
    "lora": dict(peft=True),
    "lora, beta": dict(peft=True, beta=0.1),
    "bf16": dict(bf16=True),
    "by sequence": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "cispo": dict(loss_type="cispo"),
    "adaptive entropy": ADAPTIVE_ENTROPY,
    "checkpointing": dict(gradient_checkpointing=True),
    "no dropout": dict(model=dict(attention_dropout=0.0)),
}


def assert_is_itself(tmp_path, case, **settings):
    """Neutral settings change nothing; perturbed passes generate and score nothing of their own."""
    plain, neutral, climbing = (
        train(case, tmp_path / name, config, **settings)
        for name, config in (("plain", None), ("neutral", NO_PERTURBATION), ("climbing", CLIMBING))
    )
    assert max_difference(neutral.model, plain.model) == 0.0
    # GKD writes into the loader's batch, of which the Trainer counts the operations
    left_out = {"total_flos"} if case == "gkd" else set()
    logs = [[{k: v for k, v in log.items() if k not in left_out} for log in logs_of(t)] for t in (plain, neutral)]
    assert logs[0] == logs[1]
    assert neutral.calls == climbing.calls == plain.calls
    moved = max_difference(plain.model, make_generating_trainer(case, tmp_path / "start", **settings).model)
    assert moved > 1e-3 and max_difference(climbing.model, plain.model) > 1e-4
    assert [log["sharpness"] for log in neutral.state.log_history[:-1]] == [0.0] * plain.state.max_steps
    rises = [log["sharpness"] for log in climbing.state.log_history[:-1]]
    assert all(rise > 0 for rise in rises) and len(set(rises)) == len(rises)
    return plain


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_a_trainer_prepares_as_often_as_it_does_alone(tmp_path, case):
    plain = assert_is_itself(tmp_path, case)
    assert (plain.calls.get("generations", 0) == 0) == (case in NOT_GENERATING)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_grpo_stays_itself_under_its_settings(tmp_path, name):
    assert_is_itself(tmp_path, "grpo", **SETTINGS[name])


def test_extra_passes_leave_no_trace_but_in_clocks(tmp_path):
    still = dict(learning_rate=0.0, weight_decay=0.0, **ADAPTIVE_ENTROPY)
    plain, ours = (train("grpo", tmp_path / "run", config, **still) for config in (None, dict(k=3, rho=0)))
    assert logs_of(ours) == logs_of(plain) and len({log["entropy_coef"] for log in logs_of(ours)[:-1]}) > 1
    added = (".lookbehind_config", ".transform_gradient", "._window", ".calls")
    found = differing(numbers(vars(plain)), numbers(vars(ours)))
    assert [path for path in found if not path.startswith(added)] == []


# ---- the gradient of each pass ----


class Recording(GRPOTrainer):
    """Keeps what it has prepared."""

    lookbehind_once = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prepared = []

    def _prepare_inputs(self, inputs):
        self.prepared.append(super()._prepare_inputs(inputs))
        return self.prepared[-1]


def passes_of(trainer):
    """Train, and give of each step its passes: weights and gradients by name, and the loss."""
    steps, gradient = [], Window.gradient

    def recorded(window):
        before = weights_of(trainer.model)
        if not window.losses:
            steps.append([])
        loss = gradient(window)
        found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        steps[-1].append((before, found, loss.item()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "gradient", recorded)
        trainer.train()
    return steps


def log_probabilities(model, batch):
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    n = batch["completion_ids"].shape[1]
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, -n - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def loss_by_hand(model, batches, old, beta, epsilon):
    """GRPO with DAPO's normalisation, as its papers write it; and which fraction of the tokens is clipped."""
    tokens, total, clipped = sum(batch["completion_mask"].sum() for batch in batches), 0.0, 0.0
    for batch, before in zip(batches, old, strict=True):
        now, mask, advantages = log_probabilities(model, batch), batch["completion_mask"], batch["advantages"][:, None]
        ratio = (now - before).exp()
        gain = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
        to_reference = batch["ref_per_token_logps"] - now if beta else torch.zeros(())
        divergence = beta * (to_reference.exp() - to_reference - 1)
        total = total - ((gain - divergence) * mask).sum() / tokens
        clipped += ((gain != ratio * advantages) * mask).sum().item() / tokens.item()
    return total, clipped


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_each_pass_has_the_gradient_of_one_and_the_same_loss(tmp_path, beta):
    epsilon, smooth = 0.02, dict(attention_dropout=0.0)
    trainer = make_generating_trainer(
        "grpo", tmp_path, dict(k=3, rho=0.1), base=lambda cls: Recording, max_steps=2, beta=beta, epsilon=epsilon,
        use_bias_correction_kl=False, model=smooth, learning_rate=1e-3,
    )  # fmt: skip
    trainer.model.double()
    model = type(trainer.model)(trainer.model.config).double()
    steps = passes_of(trainer)
    batches = [trainer.prepared[i : i + 2] for i in range(0, len(trainer.prepared), 2)]
    assert [len(passes) for passes in steps] == [4, 4] and len(batches) == 2
    clipped = []
    for passes, prepared in zip(steps, batches, strict=True):
        model.load_state_dict(passes[0][0], strict=False)
        with torch.no_grad():
            old = [log_probabilities(model, batch) for batch in prepared]
        for weights, gradients, loss in passes:
            model.load_state_dict(weights, strict=False)
            model.zero_grad()
            expected, fraction = loss_by_hand(model, prepared, old, beta, epsilon)
            expected.backward()
            clipped.append(fraction)
            by_name = dict(model.named_parameters())
            error = math.hypot(*((gradients[n] - by_name[n].grad).norm().item() for n in gradients))
            assert error < 1e-6 * math.hypot(*(by_name[n].grad.norm().item() for n in gradients))
            assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert clipped[0] == clipped[4] == 0 and min(clipped[1:4]) > 0.01


# ---- resuming ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, dict(peft=True), dict(steps_per_generation=4), dict(num_iterations=2), ADAPTIVE_ENTROPY], ids=str
)
def test_a_run_is_resumed_exactly_where_a_generation_ends(tmp_path, settings):
    settings = dict(max_steps=4) | settings
    whole = train("grpo", tmp_path / "a", CLIMBING, **settings)
    train("grpo", tmp_path / "b", CLIMBING, save_strategy="steps", save_steps=2, **settings)
    resumed = make_generating_trainer("grpo", tmp_path / "b", CLIMBING, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    if settings.get("use_adaptive_entropy"):
        # TRL's checkpoints do not hold the coefficient: its own trainer goes on differently too
        assert max_difference(resumed.model, whole.model) < 1e-2
    else:
        assert max_difference(resumed.model, whole.model) == 0.0


# ---- trainers of one's own ----


class Sampling(Trainer):
    """Draws its targets, and counts how often."""

    lookbehind_once = True
    drawn = 0

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self.drawn += 1
        return {"x": inputs["x"], "y": torch.randn(len(inputs["x"]), 3)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        y = inputs.pop("y")
        noise = torch.randn_like(y)
        self.met = [*getattr(self, "met", []), (y.clone(), noise, model.seen.item())]
        y += noise
        return (model(inputs["x"]) - y).square().mean()


class Net(torch.nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = torch.nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.out(x)


class Looking(Sampling):
    """Runs its model while it prepares."""

    lookbehind_once = True

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        with torch.no_grad():
            self.model(prepared["x"])
        return prepared


def train_own(cls, tmp_path, config=None, **kwargs):
    settings = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, learning_rate=0.1, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    if config is not None:
        cls = type("Ours", (LookbehindMixin, cls), {})
        kwargs["lookbehind_config"] = LookbehindConfig(**config)
    args = TrainingArguments(str(tmp_path), **settings)
    data = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(24)]
    trainer = cls(model=Net(), args=args, train_dataset=data, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cls", [Sampling, Looking])
def test_what_is_declared_once_is_prepared_once_and_met_in_every_pass(tmp_path, cls):
    """Targets, generators and buffers, of each micro-batch; though a loss writes into what it gets."""
    plain, neutral, ours = (train_own(cls, tmp_path, c) for c in (None, NO_PERTURBATION, dict(k=3, rho=0.5)))
    assert max_difference(neutral.model, plain.model) == 0.0
    assert plain.drawn == ours.drawn == neutral.drawn == 6 and max_difference(ours.model, plain.model) > 1e-4
    assert plain.model.seen == ours.model.seen
    for window in (ours.met[i : i + 8] for i in range(0, 24, 8)):
        for micro_batch in (window[0::2], window[1::2]):
            for met in micro_batch[1:]:
                assert all(torch.equal(a, b) for a, b in zip(met[:2], micro_batch[0][:2], strict=True))
                assert met[2] == micro_batch[0][2]
    assert [m[2] for m in ours.met[:2]] == [m[2] for m in plain.met[:2]]


def test_who_declares_once_and_prepares_elsewhere_is_told_so(tmp_path):
    class Elsewhere(Trainer):
        lookbehind_once = True

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(inputs["x"]).square().mean()
            loss.backward()
            return loss.detach()

    with pytest.raises(InputError, match=r"Elsewhere is declared to prepare once .*Trainer\.training_step"):
        train_own(Elsewhere, tmp_path, dict(k=1))


class Fused(GRPOTrainer):
    """A loss that asks for log-probabilities more than once, or in a way of its own."""

    times = 2

    def _compute_loss(self, model, inputs):
        if self.times == 2:
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            self._get_per_token_logps_and_entropies(model, tokens, mask, inputs["completion_ids"].shape[1])
            return super()._compute_loss(model, inputs)
        return model(input_ids=inputs["prompt_ids"]).logits.mean()


@pytest.mark.parametrize(("times", "message"), [(2, "computes .* several times"), (0, "takes no log-probabilities")])
def test_old_log_probabilities_that_are_not_known_are_an_error(tmp_path, times, message):
    with pytest.raises(InputError, match=rf"LookbehindFused {message}.*'old_per_token_logps'"):
        train("grpo", tmp_path, CLIMBING, base=lambda cls: type("Fused", (Fused,), {"times": times}), max_steps=1)


# ---- vLLM ----


class StandIn:
    """What TRL's trainers ask of vLLM, from the model itself; it remembers the weights that it was given."""

    def __init__(self, model, max_completion_length, **kwargs):
        self.model, self.length, self.synced, self.used = model, max_completion_length, [], []

    @property
    def vllm_client(self):
        return SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}})

    def sync_weights(self):
        self.synced.append(weights_of(self.model))

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        self.used.append(weights_of(self.model))
        completions, logps = [], []
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            out = self.model.generate(tokens, do_sample=True, max_new_tokens=self.length, pad_token_id=0)
            found = log_probabilities(
                self.model,
                dict(prompt_ids=tokens, completion_ids=out[:, len(prompt) :], prompt_mask=torch.ones_like(tokens),
                     completion_mask=torch.ones_like(out[:, len(prompt) :])),
            )  # fmt: skip
            completions.append(out[0, len(prompt) :].tolist())
            logps.append([[value] for value in found[0].tolist()])
        return prompts, completions, logps, None


class Slow(TrainerCallback):
    """The weights at the beginning of each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))


@pytest.mark.parametrize("mode", ["server", pytest.param("colocate", marks=pytest.mark.slow)])
def test_vllm_is_given_the_slow_weights_once_per_generation(tmp_path, monkeypatch, mode):
    """By its seam: no vLLM ran here. `sync_weights` and `generate` are called in the preparation alone."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StandIn)
    settings = dict(use_vllm=True, vllm_mode=mode, model=dict(attention_dropout=0.0))
    runs = {}
    for name, config in (("plain", None), ("neutral", NO_PERTURBATION), ("climbing", CLIMBING)):
        trainer = make_generating_trainer("grpo", tmp_path / name, config, **settings)
        slow = Slow()
        trainer.add_callback(slow)
        trainer.train()
        engine = trainer.vllm_generation
        assert len(engine.synced) == len(engine.used) == 3
        for found in (engine.synced, engine.used):
            assert all(max_difference(a, b) == 0.0 for a, b in zip(found, slow.weights, strict=True))
        runs[name] = trainer
    assert max_difference(runs["neutral"].model, runs["plain"].model) == 0.0
    assert logs_of(runs["neutral"]) == logs_of(runs["plain"])
    assert all(log["sharpness"] > 0 for log in runs["climbing"].state.log_history[:-1])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(ascent_fraction=0.5), r"ascent_fraction=0\.5 is not supported with GRPOTrainer.*Use 1"),
        (dict(rho="auto"), "rho='auto' is not supported with GRPOTrainer.*can be negative"),
    ],
)
def test_settings_that_a_generation_does_not_allow_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        make_generating_trainer("grpo", tmp_path, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(teacher_model_kind="live"), "teacher_model_kind='live' is not supported: .*Use 'base' or 'ema'"),
        (dict(use_teacher_server=True), "use_teacher_server=True is not supported: .*a teacher that is loaded here"),
    ],
)
def test_a_teacher_that_each_pass_would_ask_anew_is_refused(tmp_path, settings, message):
    trainer = make_generating_trainer("sdft", tmp_path)
    vars(trainer.args).update(settings)
    with pytest.raises(InputError, match=message):
        refuse_unsupported(trainer, LookbehindConfig())


def test_the_methods_of_trl_that_are_overridden_are_there():
    from trl.experimental.sdpo import SDPOTrainer

    for name in private.OVERRIDDEN_OF_TRL:
        assert hasattr(GRPOTrainer, name) or hasattr(SDPOTrainer, name)
    assert not any(hasattr(Trainer, name) for name in private.OVERRIDDEN_OF_TRL)
