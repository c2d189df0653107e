# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers for the command line: precision, quantisation, GGUF files."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastadapt.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from fastadapt.files import fetch
from fastadapt.patch.output import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of a model's unquantised part; "auto" is bfloat16 where matrix products have it.

    PyTorch emulates bfloat16 products on CPUs without AVX512-BF16 or AMX: 17 GFLOP/s against 126
    in float32 on 2 AVX2 cores (512 x 576 x 1536), so such a CPU gets float32.
    """
    if name != "auto":
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype must be auto or a floating dtype of torch, got {name!r}")
        return dtype
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model id or folder, with a padding token (the end token if it has none).

    Raises ConfigError when there is none, DataError when it has no token to pad with.
    """
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer in {model!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer of {model!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str, *, dtype: str = "auto", load_in_4bit: bool = False, load_in_8bit: bool = False
) -> PreTrainedModel:
    """A causal language model, on the GPU if there is one.

    4 bits: NF4 with double quantisation and bfloat16 compute; 8 bits: LLM.int8. ``dtype`` is that
    of the rest (``resolve_dtype``; "stored" keeps what the files hold). Raises ConfigError when it
    cannot be loaded and MissingExtraError without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": "auto" if dtype == "stored" else resolve_dtype(dtype)}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    if load_in_4bit or load_in_8bit:
        require("bitsandbytes", "qlora", "a base in 4 or 8 bits")
        options["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            if load_in_4bit
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    with quiet():
        try:
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the model {model!r}: {_first_line(error)}") from error
    return loaded


def is_adapter(target: str) -> bool:
    """Whether a folder or hub repository holds an adapter rather than a model."""
    return fetch(target, "adapter_config.json") is not None


def load_adapted(
    adapter: str,
    model: str | None = None,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trainable: bool = False,
) -> tuple[PreTrainedModel, str]:
    """An adapter on its base model (``model``, or the one that its config names), and that name.

    Raises CheckpointError when the config names none, and what the two loaders raise.
    """
    import fastadapt

    config = fetch(adapter, "adapter_config.json")
    if config is None:
        raise CheckpointError(f"expected adapter_config.json in {adapter!r}, not found")
    if model is None:
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            model = str(content["base_model_name_or_path"] or "")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{config} names no base model: give --model") from error
    if not model:
        raise CheckpointError(f"{config} names no base model: give --model")
    base = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit)
    return fastadapt.PeftModel.from_pretrained(base, adapter, is_trainable=trainable), model


def convert_gguf(folder: str, gguf_file: str, out: str | Path) -> Path:
    """A transformers folder from a GGUF file (bfloat16 weights, tokenizer); kept when it is there.

    Written beside ``out`` and renamed, so that ``out`` is whole or not there at all.
    """
    out = Path(out)
    if (out / "config.json").is_file():
        return out
    require("gguf", "train", "GGUF files")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The conversion's bar obeys no setting of transformers.
    with quiet(), redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf_file, dtype=torch.bfloat16
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {gguf_file}: {_first_line(error)}") from error
        # The weights were dequantised while loading, but the model keeps the quantiser's tags,
        # and with them can be neither saved nor trained.
        model.hf_quantizer = None
        model.is_quantized = False
        for owner, tag in ((model.config, "quantization_config"), (model, "quantization_method")):
            if hasattr(owner, tag):
                delattr(owner, tag)
        with replacing(out) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    return out


def gguf_cache(folder: str, gguf_file: str) -> Path:
    """Where a converted GGUF file is kept: $FASTADAPT_CACHE, or ~/.cache/fastadapt."""
    import hashlib

    root = os.environ.get("FASTADAPT_CACHE", str(Path.home() / ".cache" / "fastadapt"))
    path = Path(folder) / gguf_file
    stamp = f"{path.stat().st_size}-{path.stat().st_mtime_ns}" if path.is_file() else ""
    key = hashlib.sha256(f"{path.absolute() if stamp else path}|{stamp}".encode()).hexdigest()
    return Path(root) / "gguf" / f"{path.stem}-{key[:16]}"


def require(package: str, extra: str, purpose: str) -> None:
    """Raise MissingExtraError when a package of an optional extra cannot be found."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(package=package, extra=extra, purpose=purpose)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and the notices that nobody can act on."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    before = accelerate.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch)\b.*")
            yield
    finally:
        accelerate.setLevel(before)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
