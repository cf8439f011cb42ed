"""How many tokens a model takes, and needs."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    MPNetConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from hf_lookbehind import InputError
from hf_lookbehind.programs.models import tokenization

SMALL = dict(
    vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train_tokenizer(["a few words"], 300, frame=True)


@pytest.mark.parametrize(
    "config, longest",
    [
        (BertConfig(**SMALL, pad_token_id=1), 12),
        (OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8), 12),  # has two embeddings more than it counts
        (RobertaConfig(**SMALL), 10),  # numbers positions from the one after its padding token's id on
        (RobertaConfig(**SMALL, pad_token_id=0), 11),
        (XLMRobertaConfig(**SMALL), 10),
        (CamembertConfig(**SMALL), 10),
        (MPNetConfig(**SMALL), 10),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_model_takes_as_many_tokens_as_is_said_and_not_one_more(tokenizer, config, longest):
    assert tokenization.longest_input(tokenizer, config) == longest
    assert tokenization.choose_length("length", None, 64, tokenizer, config) == longest
    model = AutoModel.from_config(config).eval()
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_asking_draws_no_random_number_and_leaves_the_config(tokenizer):
    config, before = RobertaConfig(**SMALL), torch.get_rng_state()
    told = config.to_dict()
    tokenization.longest_input(tokenizer, config)
    assert torch.equal(torch.get_rng_state(), before) and config.to_dict() == told


@pytest.mark.parametrize("texts", [1, 2])
def test_the_fewest_tokens_leave_one_of_each_text(tokenizer, texts):
    least = tokenization.fewest_tokens(tokenizer, texts)
    ids = tokenizer(*["word"] * texts, truncation=True, max_length=least)["input_ids"]
    assert sum(i not in tokenizer.all_special_ids for i in ids) == texts
    with pytest.raises(InputError, match=f"--length {least - 1} is not allowed: {least} to 12"):
        tokenization.choose_length("length", least - 1, 64, tokenizer, BertConfig(**SMALL), least=least)
