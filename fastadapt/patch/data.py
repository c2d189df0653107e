# SPDX-License-Identifier: Apache-2.0
"""Conversations -> token ids and labels, loss on the assistant's turns only.

A conversation is divided into windows of at most ``max_length`` tokens, at the boundary before a
user turn; each window is a conversation of its own for the chat template (the system message is
repeated), as the model will meet it. The assistant's spans come from the template itself: the
text before a turn, with the generation prompt, must be a prefix of the text after it. Templates
that rewrite earlier turns break that and raise DataError; nothing is guessed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastadapt.errors import DataError
from fastadapt.patch.conversations import Conversation, Message

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that has no part in the loss (transformers' convention)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One window: ``input_ids`` and ``labels`` of equal length, labels -100 but on answers."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What became of the conversations. ``cut`` and ``skipped`` count exchanges over max_length."""

    examples: list[Example]
    conversations: int
    cut: int
    skipped: int


def make_windows(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    limit: int | None = None,
    long: str = "cut",
) -> Windows:
    """Training windows in an order drawn from ``seed``; stops after ``limit`` of them.

    ``long`` says what happens to one exchange (a question with its answers) above ``max_length``:
    "cut" keeps its first ``max_length`` tokens, "skip" leaves it out, "error" raises. Raises
    DataError when no window with an answer remains, or when a cut would leave no answer.
    """
    order = list(conversations)
    random.Random(seed).shuffle(order)
    render = _renderer(tokenizer)
    examples: list[Example] = []
    used = cut = skipped = 0
    for conversation in order:
        if limit is not None and len(examples) >= limit:
            break
        used += 1
        for text, spans in _divide(conversation, render, tokenizer, max_length):
            example = _encode(text, spans, tokenizer)
            size = len(example.input_ids)
            if size > max_length:
                if long == "skip":
                    skipped += 1
                    continue
                example = Example(
                    input_ids=example.input_ids[:max_length], labels=example.labels[:max_length]
                )
                if long == "error" or not _learns(example):
                    raise DataError(
                        f"{conversation.where}: an exchange of {size} tokens does not fit in "
                        f"max_length {max_length}"
                        + ("" if long == "error" else ", and its answer would be cut off whole")
                        + "; raise max_length, or leave such exchanges out with long=skip"
                    )
                cut += 1
            if _learns(example):
                examples.append(example)
    if not examples:
        raise DataError(
            f"none of {used} conversations gives an example with an assistant turn in "
            f"{max_length} tokens ({skipped} exchanges were too long)"
        )
    return Windows(examples=examples[:limit], conversations=used, cut=cut, skipped=skipped)


class ExampleDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Examples as transformers' Trainer reads them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


def collator(
    pad_token_id: int, length: int | None = None
) -> Callable[[Sequence[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """A function that pads a list of examples on the right, to ``length`` or to the longest.

    Gives input_ids, attention_mask, labels: (batch, length) int64.
    """

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sizes = [len(row["input_ids"]) for row in rows]
        width = max(sizes) if length is None else length
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, :size] = 1
            batch["labels"][i, :size] = torch.tensor(row["labels"])
        return batch

    return collate


Span = tuple[int, int]
Render = Callable[[list[Message], bool, str], str]


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template: take the model's instruction-tuned version, "
            "or set tokenizer.chat_template"
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which the assistant's spans "
            "need: load the fast tokenizer of this model"
        )

    def render(messages: list[Message], prompt: bool, where: str) -> str:
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses these turns: {error}") from error
        return str(text)

    return render


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages in front, and the rest divided before each user turn that follows an
    answer. Exchanges without an answer at the end have nothing to learn and are left out."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    exchanges: list[list[Message]] = []
    for message in messages[start:]:
        last = exchanges[-1] if exchanges else None
        answered = last is not None and any(m["role"] == "assistant" for m in last)
        if last is None or (message["role"] == "user" and answered):
            exchanges.append([message])
        else:
            last.append(message)
    if exchanges and not any(m["role"] == "assistant" for m in exchanges[-1]):
        exchanges.pop()
    return messages[:start], exchanges


def _divide(
    conversation: Conversation,
    render: Render,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[tuple[str, list[Span]]]:
    """The windows of one conversation: text and the assistant's character spans."""
    head, exchanges = _exchanges(conversation.messages)
    window = list(head)
    text, spans = "", list[Span]()
    for exchange in exchanges:
        longer = _extend(window, exchange, text, spans, render, conversation.where)
        if text and len(_ids(longer[0], tokenizer)["input_ids"]) > max_length:
            yield text, spans
            window = list(head)
            longer = _extend(window, exchange, "", [], render, conversation.where)
        window += exchange
        text, spans = longer
    if text:
        yield text, spans


def _extend(
    window: list[Message],
    exchange: list[Message],
    text: str,
    spans: list[Span],
    render: Render,
    where: str,
) -> tuple[str, list[Span]]:
    """The text and the spans of ``window`` (which are given) with one exchange more."""
    spans = list(spans)
    messages = list(window)
    for message in exchange:
        if message["role"] == "assistant":
            prompt = render(messages, True, where)
            full = render([*messages, message], False, where)
            if not (prompt.startswith(text) and full.startswith(prompt)):
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns when turn "
                    f"{len(messages)} is added, so the assistant's tokens cannot be told apart; "
                    "use a template whose text only grows"
                )
            # The line break that many templates put after the end-of-turn token is never
            # generated, so it is no part of the answer.
            answer = full[len(prompt) :].rstrip()
            spans.append((len(prompt), len(prompt) + len(answer)))
            text = full
        messages.append(message)
    return text, spans


def _encode(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> Example:
    encoded = _ids(text, tokenizer)
    ids: list[int] = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    todo = iter(spans)
    start, end = next(todo, (len(text), len(text)))
    for i, (first, last) in enumerate(encoded["offset_mapping"]):
        while first >= end and end < len(text):
            start, end = next(todo, (len(text), len(text)))
        if start <= first < last <= end:
            labels[i] = ids[i]
    return Example(input_ids=ids, labels=labels)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    # verbose=False: a conversation longer than the model's context is divided afterwards.
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _learns(example: Example) -> bool:
    # The first token is predicted by nothing.
    return any(label != IGNORED for label in example.labels[1:])
