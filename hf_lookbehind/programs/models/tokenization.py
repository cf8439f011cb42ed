"""Models of texts: their tokenizers, what these must be able to do, how many tokens they take."""

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from ...config import InputError
from ..cli.arguments import ModelArguments
from ..cli.paths import exists, looks_like_path
from .adapters import check_adapter_flags
from .loading import LOADING_ERRORS, blamed_on, hub_options

# Special tokens of a tokenizer that is trained here, and how it frames one text and a pair of texts.
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "sep_token": "</s>"}
_FRAMES = ("$A </s>", "$A </s> $B </s>")
FEWEST_TOKENS = 256 + len(set(SPECIAL_TOKENS.values()))  # bytes, and those


@dataclass
class TextModelArguments(ModelArguments):
    """A model of texts, its tokenizer and, instead of all its weights, adapters to train."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Id or folder of another tokenizer than the model's. Default for a new model: one is trained."
        },
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Tokens of the tokenizer that is trained for a new model (byte-level BPE)."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token of the vocabulary to pad with, where the tokenizer names none."}
    )
    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters instead of all weights. rho is then a length over the adapters alone: "
            "start with --rho 0.01, and see that the logged sharpness is a few per cent of the loss."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters: lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters. Default: all linear layers but the output's."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < FEWEST_TOKENS:
            raise InputError(f"--vocab_size {self.vocab_size} is not allowed: {FEWEST_TOKENS} or more")
        check_adapter_flags(self)

    def check_files(self) -> None:
        super().check_files()
        name = self.tokenizer_name
        if name is not None and not exists(name) and looks_like_path(name):
            raise InputError(f"--tokenizer_name {name!r}: there is no such folder")

    def inputs(self) -> dict[str, str | None]:
        return super().inputs() | {"tokenizer_name": self.tokenizer_name}


def load_tokenizer(args: TextModelArguments, texts: Iterable[str], *, frame: bool = True) -> Any:
    """The tokenizer of `--tokenizer_name` or of the model; one that is trained on the texts for a new model.

    Args:
        args: the model flags.
        texts: to train on; not read otherwise.
        frame: whether a trained tokenizer ends each text, as encoders want it.

    Raises:
        InputError: it cannot be loaded, or `--pad_token` is not in its vocabulary.
    """
    for flag in ("tokenizer_name", "model_name_or_path", "config_name"):
        name = getattr(args, flag)
        if name is not None:
            with blamed_on(flag, name):
                tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(args))
            _refuse_empty(tokenizer, flag, name)
            break
    else:
        tokenizer = train_tokenizer(texts, args.vocab_size, frame=frame)
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            some = ", ".join(map(repr, tokenizer.all_special_tokens)) or "none"
            raise InputError(
                f"--pad_token {args.pad_token!r} is not in the tokenizer's vocabulary; its special tokens are {some}"
            )
        tokenizer.pad_token = args.pad_token
    return tokenizer


def _refuse_empty(tokenizer: Any, flag: str, name: str) -> None:
    """What the library makes of a folder without a tokenizer knows nothing but special tokens."""
    ids = tokenizer("A few words, 1 2 3")["input_ids"]
    if len(tokenizer) < FEWEST_TOKENS and set(ids) <= set(tokenizer.all_special_ids):
        raise InputError(f"--{flag} {name!r} holds no tokenizer: --tokenizer_name names one")


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, frame: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it knows every text, and what it decodes is what was encoded."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(SPECIAL_TOKENS.values()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if frame:
        ends = [(token, tokenizer.token_to_id(token)) for token in special]
        single, pair = _FRAMES
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def check_padding(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that cannot pad; tell the model which token is padding.

    Raises:
        InputError: offers `--pad_token`.
    """
    if tokenizer.pad_token is None:
        ends = tokenizer.eos_token
        offer = (
            f"--pad_token {ends!r}, its end of text, will do" if ends else "--pad_token names one of its vocabulary"
        )
        raise InputError(f"the tokenizer has no token to pad with: {offer}")
    # a decoder finds the last token before the padding by it
    config.pad_token_id = tokenizer.pad_token_id


def check_vocabulary(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer whose ids go beyond the model's embeddings.

    Raises:
        InputError: tells both sizes.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model embeds {size} "
            "(vocab_size in its config): --tokenizer_name names one that fits"
        )


def longest_input(tokenizer: Any, config: PreTrainedConfig) -> int | None:
    """Tokens that the model can take at once, as its positions and its tokenizer tell; None: any number."""
    # a tokenizer that knows no limit says 10^30
    limits = [limit for limit in (_positions(config), tokenizer.model_max_length) if limit is not None]
    return min((limit for limit in limits if limit < 10**9), default=None)


def _positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model has for tokens; None where they are relative.

    RoBERTa and its kin number them from `padding_idx + 1` on: of 514 embeddings, 512 are for tokens. What the config
    does not say the layers do.
    """
    text_config = config.get_text_config()
    count = getattr(text_config, "max_position_embeddings", None)
    if count is None:
        return None
    # what is wrong with a config is told when the model itself is built
    with suppress(*LOADING_ERRORS), torch.device("meta"):
        for name, module in AutoModel.from_config(copy.deepcopy(text_config)).named_modules():
            is_position = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == count
            if is_position and module.padding_idx is not None:
                return count - module.padding_idx - 1
    return count


def fewest_tokens(tokenizer: Any, texts: int = 1) -> int:
    """Tokens of the shortest input of one text, or of two, that leaves each a token besides the special ones."""
    return tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts


def choose_length(
    flag: str, given: int | None, default: int, tokenizer: Any, config: PreTrainedConfig, *, least: int = 1
) -> int:
    """The number of tokens that a flag asks for, or the default where the model can take so many.

    Raises:
        InputError: it is below the least, or more than the model can take.
    """
    limit = longest_input(tokenizer, config)
    if given is None:
        return default if limit is None else min(default, limit)
    if getattr(config.get_text_config(), "max_position_embeddings", None) is None:
        limit = None  # relative positions: what the tokenizer tells is a habit
    if given < least or (limit is not None and given > limit):
        allowed = f"{least} or more" if limit is None else f"{least} to {limit}, which the model can take"
        raise InputError(f"--{flag} {given} is not allowed: {allowed}")
    return given
