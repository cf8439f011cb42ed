"""With PEFT, only what an adapter adds is perturbed and trained; the base is not even copied."""

import itertools
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainerCallback,
)

from hf_lookbehind import InputError, LookbehindConfig, LookbehindTrainer
from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.optim.reference import ReferenceLookbehind
from tests.live import (
    imports_set_aside,
    live_in_forwards,
    live_tensors,
    plain_tensors,
    times,
    trainable_storages,
)
from tests.models import closure_of, max_difference, weights_of
from tests.training import PLAIN, add_adapter, images, make_model, make_trainer

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)
SAM, ASAM = dict(k=3, rho=0.05), dict(k=3, rho=0.5, ascent="asam", alpha="adaptive")

# one of each mechanism: added, scaled and multiplied weights, prompts, random buffers, copies of whole modules
METHODS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2),
    "dora": lambda: LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2, use_dora=True),
    "modules_to_save": lambda: LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2, 3], target_modules=["embed_tokens"]),
}


def llama(**overrides):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def sentences(n=28):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (n, 8), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def adapted(method="lora", base=None):
    base = base or llama()
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method]())


def fit(output_dir, config, model, checkpoint=None, **options):
    trainer = make_trainer(output_dir, config, model=model, **(dict(data=sentences(), max_steps=4) | options))
    trainer.train(checkpoint)
    return trainer


def adapter_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapter_names(model):
    return set(adapter_weights(model))


def points_of(model):
    """A list that the model's forwards fill with the weights that they see."""
    points = []
    model.register_forward_pre_hook(lambda *_: points.append(weights_of(model)))
    return points


def moved(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def ascent_steps(points, k=3):
    """The weights before and after each ascent step, of points that are k+1 for each step of the Trainer."""
    return [pair for i, pair in enumerate(itertools.pairwise(points)) if i % (k + 1) < k]


def distance(a, b):
    return torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt().item()


# ---- what moves ----


@pytest.mark.parametrize("method", METHODS)
def test_no_perturbation_is_the_plain_trainer(tmp_path, method):
    plain, ours = (fit(tmp_path, config, adapted(method)).model for config in (None, NO_PERTURBATION))
    assert max_difference(ours, plain) == 0.0
    assert moved(weights_of(ours), weights_of(adapted(method))) == adapter_names(ours)


@pytest.mark.parametrize(("method", "config"), [*((name, SAM) for name in METHODS), ("lora", ASAM)], ids=str)
def test_every_adapter_parameter_moves_in_every_pass_and_the_base_in_none(tmp_path, method, config):
    model = adapted(method)
    start, names, points = weights_of(model), adapter_names(model), points_of(model)
    is_unscaled = config is ASAM and not any("weight" in name for name in names)
    with pytest.warns(LookbehindWarning, match="its step is that of SAM") if is_unscaled else nullcontext():
        fit(tmp_path, config, model)
    assert len(points) == 4 * 4
    assert set().union(*(moved(start, point) for point in [*points, weights_of(model)])) == names
    # in the first step some have no gradient yet: that of LoRA's A is B, which is 0
    for before, after in itertools.pairwise(points[4:]):
        assert moved(before, after) == names


@pytest.mark.parametrize("method", ["lora", "dora", "modules_to_save", "vera"])
def test_each_ascent_step_has_length_rho_over_the_adapters(tmp_path, method):
    model = adapted(method).double()
    points = points_of(model)
    fit(tmp_path, SAM, model)
    for before, after in ascent_steps(points):
        assert moved(before, after) <= adapter_names(model)
        assert distance(before, after) == pytest.approx(SAM["rho"], rel=1e-12)


def test_target_parameters_name_the_adapters_to_perturb_and_all_descend(tmp_path):
    model = adapted().double()
    points, targets = points_of(model), {name for name in adapter_names(model) if "lora_B" in name}
    fit(tmp_path, SAM | dict(target_parameters=["lora_B"]), model)
    for before, after in ascent_steps(points):
        assert moved(before, after) == targets
        assert distance(before, after) == pytest.approx(SAM["rho"], rel=1e-12)
    assert moved(points[0], weights_of(model)) == adapter_names(model)


def test_target_parameters_of_the_frozen_base_are_an_error_that_names_an_adapter(tmp_path):
    with pytest.raises(InputError, match="matches no trainable parameter.*for instance '[^']*lora_A"):
        fit(tmp_path, SAM | dict(target_parameters=["embed_tokens", "norm"]), adapted())


@pytest.mark.parametrize(
    "config",
    [
        dict(k=1, rho=0.02, alpha=1.0),
        dict(k=3, rho=0.02, alpha=0.5),
        dict(k=3, rho=0.02, alpha="adaptive"),
        dict(k=3, rho=0.05, alpha="adaptive-global", ascent="asam"),
    ],
    ids=str,
)
def test_lora_equals_reference(tmp_path, config):
    """12 images are one window: the order in which a sampler draws them does not matter."""

    def model():
        base = make_model(torch.float64, **PLAIN)  # Llama's norms are computed in float32
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).double()

    data, ours, expected = images(12, torch.float64), model(), model()
    fit(
        tmp_path, config, ours, data=data, per_device_train_batch_size=12, max_steps=5, max_grad_norm=0.2,
        lr_scheduler_type="constant", learning_rate=1e-3, optim="adamw_torch",
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    reference = ReferenceLookbehind(expected, optimizer, LookbehindConfig(**config), clip=0.2)
    pixels = torch.stack([image["pixel_values"] for image in data])
    labels = torch.tensor([image["labels"] for image in data])
    for _ in range(5):
        reference.step(closure_of(expected, lambda: expected(pixel_values=pixels, labels=labels).loss))
    assert max_difference(ours, expected) <= 1e-12
    assert moved(weights_of(ours), weights_of(model())) == adapter_names(ours)


# ---- adapters that come, go and are saved ----

SAVED = dict(k=3, alpha="adaptive", rho=0.05)


@pytest.mark.parametrize("config", [SAM, ASAM], ids=["sam", "asam"])
def test_a_second_adapter_trains_alone_and_the_first_stays(tmp_path, config):
    def run(config):
        model = adapted()
        trainer = fit(tmp_path, config, model)
        model.add_adapter("second", METHODS["lora"]())
        model.set_adapter("second")
        between, points = weights_of(model), points_of(model)
        trainer.optimizer = None  # the Trainer would keep the one that has the first adapter
        trainer.train()
        return model, between, points

    model, between, points = run(config)
    names = adapter_names(model)
    assert names and all(".second." in name for name in names)
    assert moved(between, weights_of(model)) == set().union(*(moved(between, point) for point in points)) == names
    assert max_difference(run(NO_PERTURBATION)[0], run(None)[0]) == 0.0


def test_adapters_that_transformers_adds_itself(tmp_path):
    """Such a model is no PeftModel."""

    def run(config):
        model = llama()
        add_adapter(model, METHODS["lora"]())
        start = weights_of(model)
        fit(tmp_path, config, model, save_strategy="steps", save_steps=4)
        assert moved(start, weights_of(model)) == adapter_names(model)
        assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
        return model

    assert max_difference(run(NO_PERTURBATION), run(None)) == 0.0
    assert max_difference(run(SAM), run(None)) > 0


class Prune(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def test_ranks_that_adalora_prunes_between_steps(tmp_path):
    """Its callback reads gradients and zeroes weights once the step is done."""

    def run(config):
        torch.manual_seed(1)
        settings = dict(target_modules=["q_proj", "v_proj"], init_r=4, target_r=1, tinit=1, tfinal=2, total_step=8)
        model = get_peft_model(llama(), peft.AdaLoraConfig(deltaT=1, **settings))
        fit(tmp_path, config, model, max_steps=8, trainer_kwargs=dict(callbacks=[Prune()]))
        return model

    assert max_difference(run(NO_PERTURBATION), run(None)) == 0.0
    ranks = [p for name, p in run(SAM).named_parameters() if "lora_E" in name]
    assert len(ranks) == 4 and sum(p.count_nonzero().item() for p in ranks) == 4 * 1


class Distilled(Trainer):
    """Its loss asks the base, too, as DPO's does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad(), model.disable_adapter():
            base = model(**inputs).logits
        self.answers = [*getattr(self, "answers", ()), base]
        outputs = model(**inputs)
        loss = outputs.loss + nn.functional.mse_loss(outputs.logits, base)
        return (loss, outputs) if return_outputs else loss


class LookbehindDistilled(LookbehindTrainer, Distilled):
    pass


def test_a_loss_that_switches_adapters_off_sees_the_base_in_every_pass(tmp_path):
    plain = fit(tmp_path, None, adapted(), cls=Distilled)
    ours = fit(tmp_path, NO_PERTURBATION, adapted(), cls=LookbehindDistilled)
    assert max_difference(ours.model, plain.model) == 0.0
    answers = fit(tmp_path, SAM, adapted(), cls=LookbehindDistilled).answers
    assert len(answers) == 4 * 4
    for step, expected in enumerate(plain.answers):
        assert all(torch.equal(answer, expected) for answer in answers[4 * step : 4 * step + 4])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_merged_model_answers_as_the_unmerged(tmp_path, method, tied):
    model = fit(tmp_path, SAM, adapted(method, llama(tie_word_embeddings=tied))).model.eval()
    ids = sentences(4)[0]["input_ids"][None]
    with torch.no_grad():
        unmerged, base = model(input_ids=ids).logits, llama(tie_word_embeddings=tied)(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (merged - unmerged).abs().max() < 1e-6 and (merged - base).abs().max() > 1e-4


class Seen(TrainerCallback):
    """The weights after each step."""

    def on_train_begin(self, *_, **__):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = weights_of(model)


def fit_and_save(output_dir, model, checkpoint=None):
    """What its six steps left, and the trainer, which has gone back to its best checkpoint: the one of most loss."""
    seen = Seen()
    trainer = fit(
        output_dir, SAVED, model, checkpoint, max_steps=6, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, trainer_kwargs=dict(callbacks=[seen], eval_dataset=sentences(8)),
    )  # fmt: skip
    return seen.weights, trainer


@pytest.fixture(scope="module", params=["lora", "modules_to_save", "prompt"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return request.param, folder, *fit_and_save(folder, adapted(request.param))


def test_checkpoint_holds_the_slow_adapters_and_the_settings(saved):
    method, folder, weights, _ = saved
    for step in (2, 4, 6):
        checkpoint = folder / f"checkpoint-{step}"
        assert (checkpoint / "adapter_model.safetensors").is_file()
        assert not (checkpoint / "model.safetensors").exists()
        assert LookbehindConfig.load(checkpoint) == LookbehindConfig(**SAVED)
        loaded = PeftModel.from_pretrained(llama(), checkpoint)
        assert max_difference(loaded, weights[step]) == 0.0


def test_resumed_equals_uninterrupted(saved, tmp_path):
    method, folder, weights, _ = saved
    resumed, _ = fit_and_save(tmp_path, adapted(method), checkpoint=str(folder / "checkpoint-4"))
    assert list(resumed) == [5, 6]
    assert max_difference(resumed[6], weights[6]) == 0.0


def test_best_adapter_is_loaded_at_the_end(saved):
    _, _, weights, trainer = saved
    best = trainer.state.best_global_step
    assert best < 6 and max_difference(weights[best], weights[6]) > 0
    assert max_difference(trainer.model, weights[best]) == 0.0


# ---- quantised bases ----


@pytest.fixture(autouse=True, scope="module")
def fast_search():
    with imports_set_aside():
        yield


def int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def frozen_values(model):
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {f"{name} {i}": part.clone() for name, p in frozen.items() for i, part in enumerate(plain_tensors(p))}


def llm_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("quantisation", [int8, nf4, llm_int8])
def test_a_quantised_base_is_neither_touched_nor_copied(tmp_path, quantisation):
    settings = quantisation()
    llama().save_pretrained(tmp_path)

    def run(config):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
        model, before = adapted(base=base), live_tensors()
        start, frozen = adapter_weights(model), frozen_values(model)
        assert any(not values.is_floating_point() for values in frozen.values())
        passes = 1 + (config or {}).get("k", 0)
        live = live_in_forwards(model, [2 * passes - 1])
        trainer = fit(tmp_path, config, model)
        assert not moved(frozen, frozen_values(model))
        assert moved(start, adapter_weights(model)) == set(start)
        assert all(log["loss"] < 10 for log in trainer.state.log_history[:-1])
        return adapter_weights(model), live[0] - before, trainable_storages(model)

    plain, plain_live, storages = run(None)
    assert max_difference(run(NO_PERTURBATION)[0], plain) == 0.0
    ours, live, _ = run(SAM)
    assert live - plain_live == times(2, storages)
    assert max_difference(ours, plain) > 0


class Packed(nn.Module):
    """Its weights are a buffer, as GPTQ and AWQ pack them, and what is trained lies beside it."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("packed", torch.randint(0, 100, (300, 256), dtype=dtype))
        self.lora_A, self.lora_B = nn.Linear(256, 2, bias=False), nn.Linear(2, 300, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x, labels):
        logits = x @ (self.packed.float() / 500 - 0.1).T + self.lora_B(self.lora_A(x))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_a_packed_buffer_is_not_copied_in_any_pass(tmp_path, dtype):
    inputs = torch.randn(28, 256, generator=torch.Generator().manual_seed(0))
    data = [{"x": x, "labels": i} for i, x in enumerate(inputs)]

    def run(config):
        model = Packed(dtype)
        live = live_in_forwards(model, range(8))
        before, packed = live_tensors(), (dtype, model.packed.nbytes)
        fit(tmp_path, config, model, data=data)
        assert live and all(tensors[packed] == before[packed] for tensors in live)
        return model

    plain = run(None)
    assert max_difference(run(NO_PERTURBATION), plain) == 0.0
    ours = run(SAM)
    assert moved(weights_of(ours), weights_of(plain)) == {"lora_A.weight", "lora_B.weight"}
    assert torch.equal(ours.packed, Packed(dtype).packed)
