"""What the programs of texts share: rows with texts in columns, and the tokenizer and config that read them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from ..cli.flags import Arguments
from ..models.tokenization import check_padding, check_vocabulary, choose_length, fewest_tokens, load_tokenizer
from .sources import Rows
from .texts import load_texts, texts_of


@dataclass(frozen=True)
class Corpus:
    """Texts, and what makes the input of a model of them.

    Attributes:
        args: all flags.
        parts: the rows of each split.
        columns: those of the texts.
        tokenizer: of the model.
        config: of the model.
    """

    args: Arguments
    parts: dict[str, Rows]
    columns: Sequence[str]
    tokenizer: Any
    config: PreTrainedConfig

    def length(self, flag: str, default: int, *, least: int | None = None) -> int:
        """Tokens of an input: what the flag says, or the default where the model can take so many.

        Raises:
            InputError: the flag says less than the least (default: one token besides the special ones), or more than
                the model can take.
        """
        least = fewest_tokens(self.tokenizer) if least is None else least
        return choose_length(flag, getattr(self.args.data, flag), default, self.tokenizer, self.config, least=least)

    def tokenized(self, tokenize: Callable[[str, Rows], Any]) -> dict[str, Any]:
        """What `tokenize` makes of each split, given its name and rows."""
        # the first process fills the cache, the others read it
        with self.args.training.main_process_first(desc="tokenizing"):
            return {split: tokenize(split, part) for split, part in self.parts.items()}


def read_splits(args: Arguments) -> dict[str, Dataset]:
    """All rows of the dataset or the files, by split."""
    with args.training.main_process_first(desc="loading the dataset"):
        return load_texts(args.data, cache_dir=args.model.cache_dir, token=args.model.token)


def with_tokenizer(
    args: Arguments,
    parts: dict[str, Rows],
    columns: Sequence[str],
    config: PreTrainedConfig | None,
    new_config: Callable[[Arguments, Any], PreTrainedConfig],
    *,
    packed: bool = False,
    texts: Iterable[str] | None = None,
) -> Corpus:
    """The corpus of these rows, with the tokenizer of the model, or one that is trained on them for a new model.

    Args:
        args: all flags.
        parts: the rows of each split.
        columns: those of the texts.
        config: of the model; None: a new one, that `new_config` gives for the flags and the tokenizer.
        new_config: see there.
        packed: whether texts are packed into blocks: then none is ended by the tokenizer, or padded.
        texts: to train a tokenizer on; default: those of the columns.

    Raises:
        InputError: the tokenizer cannot be loaded, does not fit the model, or cannot pad.
    """
    texts = texts or chain.from_iterable(texts_of(parts["train"], column) for column in columns)
    tokenizer = load_tokenizer(args.model, texts, frame=not packed)
    config = config or new_config(args, tokenizer)
    if not packed:
        check_padding(tokenizer, config)
    check_vocabulary(tokenizer, config)
    return Corpus(args, parts, columns, tokenizer, config)
