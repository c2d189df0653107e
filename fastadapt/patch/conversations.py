# SPDX-License-Identifier: Apache-2.0
"""Conversations in JSON-lines files: {"messages": [{"role", "content"}, ...]} a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastadapt.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of one line; ``where`` ("chat.jsonl:17") is for error messages."""

    messages: list[Message]
    where: str


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a JSON-lines file; blank lines are passed over.

    Raises DataError with the line's number for anything that is not a list of messages, and when
    the file is missing, holds nothing, or holds no assistant turn at all.
    """
    name = Path(path).name
    found: list[Conversation] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{name}:{number}"
                    found.append(Conversation(messages=_messages(line, where), where=where))
    except OSError as error:
        raise DataError(f"cannot read the data {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if not found:
        raise DataError(f"{path} holds no conversation: expected one JSON object a line")
    if not any(m["role"] == "assistant" for c in found for m in c.messages):
        raise DataError(
            f"{path} holds no assistant turn, so there is nothing to learn from: "
            'the answers must have "role": "assistant"'
        )
    return found


def _messages(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        got = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f'{where}: expected {{"messages": [...]}}, got {got}')
    messages: list[Message] = record["messages"]
    for number, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f'{where}: message {number} must be {{"role": text, "content": text}}, '
                f"got {json.dumps(message)[:80]}"
            )
    return messages
