# SPDX-License-Identifier: Apache-2.0
"""The implementations that op tests run over; a tiny chat model on disk and conversations for it:
nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a default system turn."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``implementation`` runs once for each, forced, on ``device``."""
    if "implementation" not in metafunc.fixturenames:
        return
    from fastadapt.ops import native

    reason = native.why_not()
    built = [pytest.mark.native, pytest.mark.skipif(reason is not None, reason=str(reason))]
    metafunc.parametrize(
        ("implementation", "device"),
        [
            pytest.param("reference", "cpu", id="reference"),
            pytest.param("native", "cpu", id="native", marks=built),
            pytest.param("reference", "cuda", id="reference_cuda", marks=pytest.mark.gpu),
            pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
        ],
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny: threads only wait for each other, seconds long on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What nobody wrote reads as NaN, in every empty tensor and in the reused buffers."""
    import torch

    from fastadapt.ops import scratch

    take = scratch.take
    monkeypatch.setattr(scratch, "take", lambda *args: take(*args).fill_(torch.nan))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of an adapter of ``tiny.model()``."""
    from tests.adapter_files import adapted

    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """A byte-level tokenizer: one token a byte, and ChatML's three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Path:
    """The folder of a Llama with 2 layers of width 32 and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat_model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(chat_tokenizer), hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=128, pad_token_id=chat_tokenizer.pad_token_id,
            eos_token_id=chat_tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of two exchanges each, every one different."""
    path = tmp_path_factory.mktemp("chat_data") / "chat.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"what is {i}?"},
                    {"role": "assistant", "content": f"{i} is a number"},
                    {"role": "user", "content": f"and {i + 1}?"},
                    {"role": "assistant", "content": "that one too"},
                ]
            }
        )
        for i in range(24)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
