"""Words and a tag for each of them: two columns of lists."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ...config import InputError
from .sources import Rows, quoted
from .spelling import in_order, spelling

# What a loss passes over.
IGNORED = -100


def words_of(part: Rows, column: str) -> list[list[str]]:
    """The words of each row.

    Raises:
        InputError: names a row that has none.
    """
    rows = part.column(column)
    for i, words in enumerate(rows):
        if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
            raise InputError(f"{part.where(i)} has {words!r} in column {column!r}: a list of words is needed")
    return rows


def tag_names(part: Rows, column: str) -> list[str]:
    """The names of all tags; where the dataset does not name them, those that occur in the split.

    Raises:
        InputError: names a row that has no list.
    """
    inner = getattr(part.dataset.features[column], "feature", None)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    return in_order({spelling(tag) for tags in _lists(part.whole_split(), column) for tag in tags})


def encode_tags(part: Rows, columns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """The number of the tag of each word.

    Args:
        part: its rows.
        columns: of the words and of the tags.
        names: of the tags, in the order of the model's head.

    Raises:
        InputError: names a row with an unknown tag, or with another number of tags than of words.
    """
    words_column, tags_column = columns
    inner = getattr(part.dataset.features[tags_column], "feature", None)
    position = {name: number for number, name in enumerate(names)}
    encoded = []
    for i, (words, tags) in enumerate(zip(words_of(part, words_column), _lists(part, tags_column), strict=True)):
        if len(words) != len(tags):
            raise InputError(f"{part.where(i)} has {len(words)} words and {len(tags)} tags: one for each is needed")
        given = [inner.names[tag] if isinstance(inner, ClassLabel) else spelling(tag) for tag in tags]
        unknown = [name for name in given if name not in position]
        if unknown:
            raise InputError(f"{part.where(i)} has the tag {unknown[0]!r}: the tags are {quoted(names)}")
        encoded.append([position[name] for name in given])
    return encoded


def _lists(part: Rows, column: str) -> list[list[Any]]:
    rows = part.column(column)
    for i, tags in enumerate(rows):
        if not isinstance(tags, list) or None in tags:
            raise InputError(f"{part.where(i)} has {tags!r} in column {column!r}: a list of tags is needed")
    return rows


def tokenize(part: Rows, columns: Sequence[str], tokenizer: Any, max_length: int, names: Sequence[str]) -> Dataset:
    """Words as a model takes them: token ids, cut to a length, and a label at the first token of each word.

    Args:
        part, columns, names: see `encode_tags`.
        tokenizer: of the model; see `reads_words`.
        max_length: in tokens.

    Raises:
        InputError: see `encode_tags`.
    """
    column, _ = columns
    tags = encode_tags(part, columns, names)

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> Any:
        encoded = tokenizer(batch[column], is_split_into_words=True, truncation=True, max_length=max_length)
        encoded["labels"] = [_at_first_tokens(encoded.word_ids(i), tags[row]) for i, row in enumerate(rows)]
        return encoded

    rows = part.dataset.with_format(None).select_columns([column]).select(part.rows)
    # not from the cache, whose key knows no tags
    return rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=[column],
        load_from_cache_file=False,
        desc=f"tokenizing {part.name}",
    )


def _at_first_tokens(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    before = [None, *word_ids[:-1]]
    return [
        IGNORED if word is None or word == last else tags[word] for word, last in zip(word_ids, before, strict=True)
    ]


def share_cut(dataset: Dataset, part: Rows, column: str) -> float:
    """Which part of the words has no label, as the rows were longer than the model takes."""
    words = sum(map(len, part.column(column)))
    return 1 - sum(int(np.sum(np.asarray(labels) != IGNORED)) for labels in dataset["labels"]) / words


def reads_words(tokenizer: Any) -> Any:
    """The tokenizer, which tells words apart that it is given one by one.

    Those of bytes (GPT-2's, RoBERTa's) know a word by the space before it.

    Raises:
        InputError: it cannot say which token is of which word.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} cannot say which token is of which word: --tokenizer_name "
            "names one that has a tokenizer.json"
        )
    stage = tokenizer.backend_tokenizer.pre_tokenizer
    if getattr(stage, "add_prefix_space", None) is False:
        stage.add_prefix_space = True
        tokenizer.add_prefix_space = True
    return tokenizer
