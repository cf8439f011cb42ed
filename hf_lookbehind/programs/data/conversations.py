"""What a language model is to say: conversations, completions, or texts; as tokens, with what is learned of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ...config import InputError
from .sources import Rows, find_column, find_columns

# What a loss passes over.
IGNORED = -100
Tokens = tuple[list[int], list[int]]


class Encoder:
    """Rows of one kind as token ids and labels.

    A conversation (`messages`) teaches what its assistant says, a prompt with a completion (texts, or conversations)
    the completion, a text all of it.

    Args:
        dataset: whose columns tell the kind.
        tokenizer: of the model; for conversations it has a chat template.
        learns_all: prompts and what others say as well.
        columns: those that the flags name, by flag: "text_column_name", "messages_column_name", "prompt_column_name",
            "completion_column_name".

    Attributes:
        columns: those that are read.

    Raises:
        InputError: there are no such columns, or the tokenizer has no chat template, or no end of text.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, learns_all: bool, columns: Mapping[str, str]):
        self._tokenizer, self._learns_all = tokenizer, learns_all
        pair = [columns["prompt_column_name"], columns["completion_column_name"]]
        kinds: list[tuple[list[str], Callable[..., Tokens]]] = [
            ([columns["messages_column_name"]], self._conversation),
            (pair, self._completion),
            ([columns["text_column_name"]], self._text),
        ]
        found = [kind for kind in kinds if set(kind[0]) <= set(dataset.column_names)]
        if not found:
            find_column(dataset, None, [name for names, _ in kinds for name in names], "text_column_name")
            find_columns(dataset, pair, "prompt_column_name")
        self.columns, self._encode = found[0]
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token), at which what is learned would end")

    def __call__(self, part: Rows, max_length: int) -> Dataset:
        """Token ids, cut to a length, and labels; rows of which nothing is learned then are left out.

        Raises:
            InputError: names a row that is none of this kind.
        """
        rows = part.dataset.with_format(None).select_columns(self.columns).select(part.rows)

        def encode(row: dict[str, Any], i: int) -> dict[str, list[int]]:
            try:
                ids, labels = self._encode(*(row[name] for name in self.columns))
            except _Unfit as error:
                raise InputError(f"{part.where(i)} {error}") from error
            return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

        encoded = rows.map(
            encode,
            with_indices=True,
            remove_columns=self.columns,
            load_from_cache_file=False,
            desc=f"tokenizing {part.name}",
        )
        kept = [i for i, labels in enumerate(encoded["labels"]) if any(label != IGNORED for label in labels[1:])]
        if not kept:
            raise InputError(f"{part.name} teaches nothing within --max_length {max_length} tokens")
        return encoded.select(kept)

    def _text(self, text: Any) -> Tokens:
        ids = [*self._ids(_text(text)), self._tokenizer.eos_token_id]
        return ids, list(ids)

    def _completion(self, prompt: Any, completion: Any) -> Tokens:
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._conversation([*prompt, *completion], learned_from=len(prompt))
        asked = self._ids(_text(prompt))
        said = self._tokenizer(_text(completion), add_special_tokens=False, verbose=False)["input_ids"]
        said = [*said, self._tokenizer.eos_token_id]
        return [*asked, *said], [*(asked if self._learns_all else [IGNORED] * len(asked)), *said]

    def _conversation(self, messages: Any, learned_from: int = 0) -> Tokens:
        if self._tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template, which conversations want: --tokenizer_name names one"
            )
        if not (isinstance(messages, list) and messages and all(_is_turn(turn) for turn in messages)):
            raise _Unfit(f"has {messages!r}: a list of messages with role and content is needed")
        ids = self._rendered(messages)
        if self._learns_all:
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        for i, turn in enumerate(messages):
            if turn["role"] == "assistant" and i >= learned_from:
                start = self._shared(ids, messages[:i], add_generation_prompt=True)
                end = self._shared(ids, messages[: i + 1])
                labels[start:end] = ids[start:end]
        return ids, labels

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    def _shared(self, ids: Sequence[int], messages: Sequence[Mapping[str, Any]], **options: Any) -> int:
        """How many tokens of a conversation its first messages make; the last may be one with what follows."""
        first = self._rendered(messages, **options)
        shared = next((i for i, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), len(first))
        if shared < len(first) - 1:
            raise InputError(
                "the chat template writes a message differently when others follow, so that what the assistant says "
                "cannot be told apart: --learn all learns from all messages"
            )
        return shared

    def _ids(self, text: str) -> list[int]:
        # not verbose: that a text is longer than the model takes is no problem here
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] else ids


class _Unfit(ValueError):
    """A row that is none of its kind."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unfit(f"has {value!r}, which is no text")
    return value


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
