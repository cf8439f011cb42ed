"""A small new encoder, for the programs that train one where no model is named."""

from typing import Any

from transformers import BertConfig

from . import loading


def small_bert(tokenizer: Any, positions: int, overrides: str | None) -> BertConfig:
    """Its config.

    Args:
        tokenizer: whose tokens it embeds.
        positions: tokens of the longest input.
        overrides: `--config_overrides`.

    Raises:
        InputError: names a key that the config does not have, or a value that does not fit.
    """
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        # about 1/sqrt(hidden_size): with the 0.02 of large models so small a one hardly starts to learn
        initializer_range=0.1,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    loading.override(config, overrides)
    return config
