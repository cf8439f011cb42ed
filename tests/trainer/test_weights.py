"""A checkpoint's weights reach the model that is there bit for bit, or it is refused; whatever the user changed."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from hf_lookbehind import InputError
from hf_lookbehind.trainer.weights import load_weights, read_weights, refuse_other_model
from tests.models import layers_of, max_difference, vit_config, weights_of
from tests.training import PLAIN, add_adapter, images, make_model, make_trainer, train

SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
IMAGES = SIZES | dict(image_size=4, patch_size=2, num_channels=1, num_labels=4)
TEXTS = SIZES | dict(vocab_size=20, max_position_embeddings=16)
SWIN = dict(image_size=4, patch_size=1, num_channels=1, embed_dim=4, depths=[1, 1], num_heads=[2, 2], window_size=2)
CLIP = dict(text_config=TEXTS, vision_config={k: v for k, v in IMAGES.items() if k != "num_labels"}, projection_dim=4)

MODELS = {
    "deit": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**IMAGES)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**IMAGES)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**IMAGES)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN, num_labels=4)),
    "clip": lambda: CLIPForImageClassification(CLIPConfig(**CLIP, num_labels=4)),
    "mixture": lambda: MixtralForCausalLM(MixtralConfig(**TEXTS, num_key_value_heads=2, num_local_experts=3)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXTS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
}


class WithAnInitOfItsOwn(ViTForImageClassification):
    def __init__(self, width, *, extra):
        super().__init__(vit_config())
        self.extra = nn.Linear(width, extra)


def head(model):
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 4))


def fewer_layers(model):
    del layers_of(model)[1:]


def first_convolution(model):
    model.vit.embeddings.patch_embeddings.projection = nn.Conv2d(3, 8, 2, 2)


def injected_lora(model):
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), model)


def added_lora(model):
    add_adapter(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def weight_norm(model):
    for module in [module for module in model.modules() if type(module) is nn.Linear]:
        nn.utils.parametrizations.weight_norm(module)


def old_weight_norm(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.vit.embeddings.patch_embeddings.projection)


def a_second_backbone(model):
    model.teacher = make_model().vit


def mixed_precision(model):
    model.bfloat16().classifier.float()


CHANGES = [
    head, fewer_layers, first_convolution, injected_lora, added_lora, weight_norm, old_weight_norm, a_second_backbone,
    mixed_precision,
]  # fmt: skip


def changed(change, **overrides):
    model = make_model(**overrides)
    return change(model) or model


MADE = (
    MODELS
    | {change.__name__: (lambda change=change: changed(change)) for change in CHANGES}
    | {"subclass": lambda: WithAnInitOfItsOwn(3, extra=2), "compiled": lambda: torch.compile(make_model())}
)


def drawn(model, seed):
    """The model, with other weights and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "shard_size"), [*((name, "50GB") for name in MADE), ("mixture", "1KB"), ("head", "1KB")]
)
def test_saved_weights_come_back_into_the_same_parameters(tmp_path, name, shard_size):
    saved, model = drawn(MADE[name](), seed=1), drawn(MADE[name](), seed=2)
    before = {name: id(p) for name, p in model.named_parameters()}
    # as the Trainer saves, also what torch.compile has wrapped
    saved_by = getattr(saved, "_orig_mod", saved)
    saved_by.save_pretrained(tmp_path, state_dict=dict(saved.state_dict()), max_shard_size=shard_size)
    refuse_other_model(model, tmp_path)
    loaded = load_weights(model, tmp_path)
    if loaded is None:  # the Trainer's own way will do
        loaded = model.load_state_dict(read_weights(tmp_path), strict=False)
        loaded.missing_keys[:] = [name for name in loaded.missing_keys if name not in saved_by.all_tied_weights_keys]
    assert not loaded.missing_keys and not loaded.unexpected_keys
    theirs, ours = saved.state_dict(), model.state_dict()
    for key in (key for key in theirs if name != "added_lora" or "lora" in key):
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_file_with_older_names_than_the_model_would_save_is_understood(tmp_path):
    from safetensors.torch import save_file

    saved, model = drawn(MODELS["bert"](), seed=1), drawn(MODELS["bert"](), seed=2)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = saved.state_dict()
    for new in old:
        weights = {name.replace(new, old[new]): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    load_weights(model, tmp_path)
    assert max_difference(model, saved) == 0.0


RUN = dict(max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)


@pytest.mark.parametrize("change", [head, added_lora])
def test_a_changed_model_is_resumed_and_its_best_weights_loaded(tmp_path, change):
    def run(folder, checkpoint=None, **options):
        trainer = make_trainer(
            tmp_path / folder, dict(k=2, rho=0.05), model=changed(change, **PLAIN),
            trainer_kwargs=dict(eval_dataset=images()), **RUN, **options,
        )  # fmt: skip
        trainer.train(checkpoint)
        return trainer

    whole = run("out")
    resumed = run("out", str(tmp_path / "out" / "checkpoint-2"))
    assert max_difference(resumed.model, whole.model) == 0.0
    # the loss only rises
    best = run("best", load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    saved = changed(change, **PLAIN)
    found = read_weights(best.state.best_model_checkpoint)
    if load_weights(saved, best.state.best_model_checkpoint) is None:  # the names in the file are the model's own
        saved.load_state_dict(found)
    assert max_difference(best.model, saved) == 0.0
    at = best.state.best_global_step
    assert at == 4 or max_difference(best.model, whole.model) > 0


def bert(**overrides):
    return BertForSequenceClassification(BertConfig(**(TEXTS | overrides)))


def adapted(**overrides):
    return peft.get_peft_model(bert(), peft.LoraConfig(**(dict(r=2, target_modules=["query", "value"]) | overrides)))


@pytest.mark.parametrize(
    ("saved", "model", "message"),
    [
        (lambda: bert(num_labels=3), bert, r"its classifier\.bias has the size \[3\], not \[2\]"),
        (bert, lambda: bert(num_hidden_layers=3), r"it has no bert\.encoder\.layer\.2\..* and 15 more"),
        (lambda: bert(num_hidden_layers=3), bert, r"this one has no bert\.encoder\.layer\.2\..* and 15 more"),
        (MODELS["gpt2"], bert, "none of its weights has a place in this one"),
        (make_model, MODELS["deit"], "none of its weights has a place in this one"),
        (make_model, lambda: changed(head), r"it has no classifier\.1\.weight"),
        (adapted, bert, "it holds adapters only"),
        (bert, adapted, "it holds a whole one"),
        (lambda: adapted(r=4), adapted, r"lora_A\.weight has the size \[4, 8\], not \[2, 8\]"),
        (lambda: adapted(target_modules=["query"]), adapted, r"it has no .*value\.lora_A"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_loaded(tmp_path, saved, model, message):
    saved().save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").touch()
    trainer = make_trainer(tmp_path / "out", dict(k=1), model=model())
    before = weights_of(trainer.model)
    with pytest.raises(InputError, match=f"^'{tmp_path}' is of another model: .*{message}"):
        trainer.train(str(tmp_path))
    assert max_difference(trainer.model, before) == 0.0


def test_a_checkpoint_without_weights_or_with_damaged_ones_is_named(tmp_path):
    with pytest.raises(InputError, match=f"Can't find a valid checkpoint at '{tmp_path}': it holds no weights"):
        refuse_other_model(make_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=f"'{tmp_path}/model.safetensors' is damaged"):
        refuse_other_model(make_model(), tmp_path)


def test_without_the_optimizer_a_model_with_more_layers_goes_on_as_in_the_trainer(tmp_path, monkeypatch):
    train(tmp_path, dict(k=1), max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    make_trainer(tmp_path, dict(k=1), model=changed(a_second_backbone), max_steps=2).train(
        str(tmp_path / "checkpoint-1")
    )
    assert [message for message in said if "missing keys" in message and "teacher" in message]
