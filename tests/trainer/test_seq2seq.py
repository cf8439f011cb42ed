"""Encoder-decoder models: their steps do not depend on how they are accumulated, and evaluations leave no trace."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaForConditionalGeneration,
)

from hf_lookbehind import LookbehindConfig, LookbehindSeq2SeqTrainer
from hf_lookbehind.trainer.seq2seq import _divides_by_items
from tests.models import max_difference

BART = dict(
    vocab_size=12, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, init_std=0.2, dropout=0.0, pad_token_id=0,
    decoder_start_token_id=2, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
T5 = dict(
    vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
)
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART, forced_eos_token_id=1)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART, forced_eos_token_id=1)),
}


def pairs():
    """Targets of one to four tokens: each micro-batch has other ones."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 12, (16, 5), generator=draw)
    start = torch.tensor([2])
    return [
        {
            "input_ids": text,
            "labels": torch.where(torch.arange(4) < 1 + i % 4, text[:4], -100),
            "decoder_input_ids": torch.cat([start, text[:3]]),  # which label smoothing needs
        }
        for i, text in enumerate(texts)
    ]


def train(folder, name, *, config=None, batch=8, steps=1, cls=LookbehindSeq2SeqTrainer, loss=None, data=None, **args):
    torch.manual_seed(0)
    if config is not None:
        options = dict(lookbehind_config=LookbehindConfig(**config), compute_loss_func=loss)
    else:
        cls, options = Seq2SeqTrainer, {}
    settings = dict(
        max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, optim="sgd",
        learning_rate=0.5, max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    trainer = cls(
        model=MODELS[name]().double(),
        args=Seq2SeqTrainingArguments(str(folder), **(settings | args)),
        train_dataset=data or pairs(),
        eval_dataset=pairs()[:6],
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("config", [dict(k=0), dict(k=2, rho=0.1)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_accumulated_micro_batches_are_one_batch(tmp_path, name, config, smoothing):
    """Each token counts once, however they are divided."""
    whole, parts = (
        train(tmp_path, name, config=config, batch=batch, steps=steps, label_smoothing_factor=smoothing)
        for batch, steps in ((8, 1), (4, 2))
    )
    # T5's norms, and the library's smoothing, sum in float32
    close = 1e-12 if name != "t5" and not smoothing else 1e-5
    assert max_difference(whole.model, parts.model) < close and max_difference(whole.model, MODELS[name]()) > 1e-2
    losses = [[row["loss"] for row in trainer.state.log_history[:2]] for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=close)


@pytest.mark.parametrize("name", MODELS)
def test_without_accumulation_it_is_the_plain_trainer(tmp_path, name):
    plain = train(tmp_path, name)
    for config in (dict(k=0), dict(k=1, rho=0, alpha=1)):
        trainer = train(tmp_path, name, config=config)
        assert max_difference(trainer.model, plain.model) == 0.0
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-12)


def test_a_loss_of_the_users_own_is_taken_as_it_is(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        seen.append((labels != -100).sum() / num_items_in_batch)
        return outputs.logits.square().sum() / num_items_in_batch

    seen = []
    train(tmp_path, "bart", config=dict(k=1), loss=loss, batch=4, steps=2, max_steps=1)
    assert len(seen) == 4 and sum(seen).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("cls", "does"),
    [
        (T5GemmaForConditionalGeneration, True),
        (T5ForConditionalGeneration, False),
        (BartForConditionalGeneration, False),
        (MarianMTModel, False),
        (EncoderDecoderModel, False),
    ],
)
def test_which_models_divide_by_the_items(cls, does):
    assert _divides_by_items(object.__new__(cls)) is does


def test_it_generates_and_leaves_the_generation_config(tmp_path):
    trainer = train(tmp_path, "t5", config=dict(k=2), predict_with_generate=True, generation_max_length=3, max_steps=1)
    generated = []
    trainer.compute_metrics = lambda p: generated.append(p.predictions) or {"n": len(p.predictions)}
    trainer.model.generation_config.max_new_tokens = 9
    before = dict(vars(trainer.model.generation_config))
    assert trainer.evaluate()["eval_n"] == 6 and (generated[0][:, 3:] == 0).all()
    assert vars(trainer.model.generation_config) == before


def test_a_micro_batch_without_a_target_counts_for_nothing(tmp_path):
    """Its mean over no tokens is nan."""
    data = pairs()[:4]
    data[2]["labels"] = torch.full_like(data[2]["labels"], -100)
    config = dict(k=2, rho=0.1)
    whole, parts = (
        train(tmp_path, "bart", config=config, batch=batch, steps=steps, data=data)
        for batch, steps in ((4, 1), (1, 4))
    )
    assert max_difference(whole.model, parts.model) < 1e-12
    for row, expected in zip(parts.state.log_history[:2], whole.state.log_history[:2], strict=True):
        assert all(row[name] == pytest.approx(expected[name]) for name in ("loss", "sharpness", "ascent_loss"))
