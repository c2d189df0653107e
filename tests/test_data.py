# SPDX-License-Identifier: Apache-2.0
"""Conversations -> windows: the loss falls on the assistant's turns and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.errors import DataError
from fastadapt.patch.conversations import Conversation, read_conversations
from fastadapt.patch.data import IGNORED, Example, collator, make_windows

Turns = list[tuple[str, str]]


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(
        messages=[{"role": role, "content": content} for role, content in turns], where="x:1"
    )


def windows(turns: Turns, tokenizer: Any, max_length: int = 1000, **more: Any) -> list[Example]:
    made = make_windows([conversation(*turns)], tokenizer, max_length=max_length, seed=0, **more)
    return made.examples


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The runs of labelled tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


EXCHANGES: Turns = [
    ("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second é"),
]  # fmt: skip


def test_labels_are_the_answers_with_their_end(chat_tokenizer: Any) -> None:
    (example,) = windows([("system", "be brief"), *EXCHANGES], chat_tokenizer)
    assert learned(example, chat_tokenizer) == ["first<|im_end|>", "second é<|im_end|>"]
    kept = [label for label in example.labels if label != IGNORED]
    assert all(
        label in (token, IGNORED)
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    assert len(kept) == len("first") + len("second é".encode()) + 2


def test_ids_are_what_the_template_renders(chat_tokenizer: Any) -> None:
    (example,) = windows(EXCHANGES, chat_tokenizer)
    messages = conversation(*EXCHANGES).messages
    whole = chat_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert example.input_ids == whole["input_ids"]


def test_long_conversations_are_divided_at_user_turns(chat_tokenizer: Any) -> None:
    turns = [("system", "be brief"), *EXCHANGES * 5]
    made = windows(turns, chat_tokenizer, max_length=180)
    texts = [chat_tokenizer.decode(example.input_ids) for example in made]
    assert len(made) > 1
    assert all(len(example.input_ids) <= 180 for example in made)
    head = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n"
    assert all(text.startswith(head) for text in texts)
    # Nothing is lost and nothing is learned twice.
    answers = [answer for example in made for answer in learned(example, chat_tokenizer)]
    assert answers == ["first<|im_end|>", "second é<|im_end|>"] * 5


def test_an_exchange_that_does_not_fit(chat_tokenizer: Any) -> None:
    turns = [("user", "long?"), ("assistant", "y" * 100), *EXCHANGES]
    cut = windows(turns, chat_tokenizer, max_length=90)
    assert len(cut[0].input_ids) == 90
    assert set(learned(cut[0], chat_tokenizer)[0]) == {"y"}
    skipped = windows(turns, chat_tokenizer, max_length=90, long="skip")
    assert [learned(e, chat_tokenizer) for e in skipped] == [
        ["first<|im_end|>", "second é<|im_end|>"]
    ]
    with pytest.raises(DataError, match=r"x:1: an exchange of \d+ tokens.*max_length 90"):
        windows(turns, chat_tokenizer, max_length=90, long="error")
    with pytest.raises(DataError, match="its answer would be cut off whole"):
        windows([("user", "x" * 200), ("assistant", "y")], chat_tokenizer, max_length=90)
    with pytest.raises(DataError, match="none of 1 conversations"):
        windows(
            [("user", "x" * 200), ("assistant", "y")], chat_tokenizer, max_length=90, long="skip"
        )


def test_order_comes_from_the_seed_and_limit_takes_its_start(chat_tokenizer: Any) -> None:
    many = [conversation(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(20)]
    orders = [
        [e.input_ids for e in make_windows(many, chat_tokenizer, max_length=99, seed=s).examples]
        for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    few = make_windows(many, chat_tokenizer, max_length=99, seed=1, limit=7)
    assert [e.input_ids for e in few.examples] == orders[0][:7]


def test_tool_turns_stay_with_their_question(chat_tokenizer: Any) -> None:
    turns = [("user", "sum?"), ("assistant", "call"), ("tool", "3"), ("assistant", "it is 3")]
    (example,) = windows([*turns, ("user", "unanswered")], chat_tokenizer)
    assert learned(example, chat_tokenizer) == ["call<|im_end|>", "it is 3<|im_end|>"]
    assert "unanswered" not in chat_tokenizer.decode(example.input_ids)


REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}(gone){% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (REWRITES, "x:1: the chat template rewrites earlier turns"),
        ("{{ raise_exception('roles must alternate') }}", "x:1: .*roles must alternate"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_serve(
    chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, problem: str
) -> None:
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=problem):
        windows(EXCHANGES, chat_tokenizer)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "holds no conversation"),
        (["", "  "], "holds no conversation"),
        (["{"], "d.jsonl:1: not JSON"),
        (['{"text": "x"}'], r"d.jsonl:1: expected .*got the keys \['text'\]"),
        (["[1]"], "d.jsonl:1: expected .*got list"),
        (['{"messages": []}'], "no assistant turn"),
        (['{"messages": [{"role": "user"}]}'], "d.jsonl:1: message 0 must be"),
        (['{"messages": [{"role": "user", "content": null}]}'], "d.jsonl:1: message 0 must be"),
        (['{"messages": [{"role": "user", "content": "x"}]}'], "no assistant turn"),
    ],
)
def test_bad_files(tmp_path: Path, lines: list[str], problem: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        read_conversations(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_conversations(tmp_path / "binary")


def test_where_counts_lines(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "assistant", "content": "x"}]})
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert [c.where for c in read_conversations(tmp_path / "d.jsonl")] == ["d.jsonl:1", "d.jsonl:3"]


@pytest.mark.parametrize("length", [None, 6])
def test_collator_pads_on_the_right(length: int | None) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]},
        {"input_ids": [4], "labels": [4]},
    ]
    batch = collator(9, length)(rows)
    width = length or 3
    assert torch.equal(batch["input_ids"][1], torch.tensor([4] + [9] * (width - 1)))
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert torch.equal(batch["labels"] != IGNORED, torch.tensor(
        [[False, True, True] + [False] * (width - 3), [True] + [False] * (width - 1)]
    ))  # fmt: skip
