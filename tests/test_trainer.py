# SPDX-License-Identifier: Apache-2.0
"""Adapted models in the ecosystem's loops: transformers' Trainer, TRL, Accelerate, DDP."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from tests import tiny
from tests.budget import assert_within_budget

transformers = pytest.importorskip("transformers")

ROWS = 16
DOORS = ("patch", "wrapper")
FORMATS = ("fp32", "nf4")
CHECKPOINTING = next(
    f.name
    for f in fields(transformers.TrainingArguments)
    if f.name in ("activation_checkpointing", "gradient_checkpointing")
)
"""transformers renames this option."""


def adapted(door: str, fmt: str = "fp32", base: Any = None, **options: Any) -> Any:
    """A tiny Llama with adapters that are not zero, through one of the doors (or PEFT's own)."""
    base = tiny.model("llama", fmt) if base is None else base
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    if door == "peft":
        import peft

        model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    else:
        make = fastadapt.patch if door == "patch" else fastadapt.get_peft_model
        model = make(base, fastadapt.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in tiny.adapter_parameters(model):
        parameter.data.normal_(std=0.02, generator=generator)
    return model


def dataset() -> list[dict[str, Tensor]]:
    batch = tiny.batch(rows=ROWS)
    return [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """For TrainingArguments and those that derive from it; checkpoints after steps 2, 4 and 6."""
    return {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
        CHECKPOINTING: False, **options,
    }  # fmt: skip


def trainer(model: Any, folder: Path, callbacks: Any = None, **options: Any) -> Any:
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**settings(folder, **options)),
        train_dataset=dataset(), eval_dataset=dataset(), callbacks=callbacks,
    )  # fmt: skip


def adapter(model: Any) -> dict[str, Tensor]:
    """Adapter tensors under the names that all doors share."""
    return {
        name.removeprefix("module.").removeprefix("base_model.model."): p.detach().clone()
        for name, p in tiny.adapter_parameters(model)
    }


def files(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in found.items()}


def losses(done: Any) -> list[float]:
    return [row["loss"] for row in done.state.log_history if "loss" in row]


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


# transformers' Trainer --------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("door", DOORS)
def test_a_run_trains_and_saves_the_adapter_alone(door: str, fmt: str, tmp_path: Path) -> None:
    model = adapted(door, fmt)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = adapter(model)
    run = trainer(model, tmp_path)
    run.train()
    assert run.label_names == ["labels"]
    assert losses(run)[-1] < losses(run)[0]
    assert not any(torch.equal(start[k], v) for k, v in adapter(model).items())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    for step in (2, 4, 6):
        kept = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= kept
        assert not any(name.startswith(("model", "pytorch_model")) for name in kept)
    last = files(tmp_path / "checkpoint-6")
    assert_equal({k.replace(".weight", ".default.weight"): v for k, v in last.items()},
                 dict(sorted(adapter(model).items())))  # fmt: skip
    metrics = run.evaluate()
    batch = tiny.batch(rows=ROWS)
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(
            model.eval()(**batch).loss.item(), rel=math.sqrt(torch.finfo(model.dtype).eps)
        )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("door", DOORS)
def test_a_resumed_run_equals_an_uninterrupted_one(door: str, fmt: str, tmp_path: Path) -> None:
    whole = trainer(adapted(door, fmt, lora_dropout=0.1), tmp_path)
    whole.train()
    rest = trainer(adapted(door, fmt, lora_dropout=0.1), tmp_path)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.state.global_step == 6
    assert_equal(adapter(rest.model), adapter(whole.model))
    assert losses(rest) == losses(whole)


@pytest.mark.parametrize("door", DOORS)
def test_the_best_model_is_loaded_at_the_end(door: str, tmp_path: Path) -> None:
    model = adapted(door)
    run = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    # the loss falls, so with "greater is better" the first checkpoint is the best
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best, now = files(tmp_path / "checkpoint-2"), adapter(model)
    assert_equal({k.replace(".weight", ".default.weight"): v for k, v in best.items()},
                 dict(sorted(now.items())))  # fmt: skip
    assert all(p.requires_grad for _, p in tiny.adapter_parameters(model))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("door", DOORS)
def test_checkpointing_of_activations_changes_nothing(
    door: str, reentrant: bool, tmp_path: Path
) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        done = trainer(adapted(door, lora_dropout=0.1), tmp_path, save_strategy="no", **options)
        done.train()
        return adapter(done.model)

    kwargs = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    assert_equal(run(**{CHECKPOINTING: True}, **kwargs), run())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("door", DOORS)
def test_bf16_autocast(door: str, fmt: str, tmp_path: Path) -> None:
    model = adapted(door, fmt)
    run = trainer(model, tmp_path, bf16=True, save_strategy="no")
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert all(p.dtype == torch.float32 for _, p in tiny.adapter_parameters(model))


@pytest.mark.parity
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_first_step_under_autocast_is_as_near_as_that_of_peft(fmt: str, tmp_path: Path) -> None:
    got = [gradients(adapted(d, fmt), tmp_path, bf16=True) for d in ("patch", "wrapper", "peft")]
    exact = gradients(in_float64(adapted("peft", fmt)), tmp_path)
    assert_within_budget(got[0], got[2], exact)
    assert_within_budget(got[1], got[2], exact)


@pytest.mark.parity
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = {"per_device_train_batch_size": 8}
    exact = gradients(in_float64(adapted("peft")), tmp_path, **whole)
    theirs = gradients(adapted("peft"), tmp_path, **whole)
    for door in DOORS:
        for way in (whole, parts):
            assert_within_budget(gradients(adapted(door), tmp_path, **way), theirs, exact)


def gradients(model: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Those of the first step, as the optimizer sees them."""
    found: dict[str, Tensor] = {}

    class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, p in tiny.adapter_parameters(model):
                found[name.removeprefix("base_model.model.")] = p.grad.clone()

    options = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, **options}
    trainer(model, folder, [Look()], **options).train()
    return found


def in_float64(model: Any) -> Any:
    """A PEFT model over dequantised weights, with the same adapters."""
    quantised = any(type(p).__name__ == "Params4bit" for p in model.parameters())
    if not quantised:
        return model.double()
    twin = adapted("peft", base=tiny.dequantised(tiny.model("llama", "nf4"), "llama")).double()
    found = dict(twin.named_parameters())
    for name, parameter in tiny.adapter_parameters(model):
        found[name].data = parameter.detach().double()
    return twin


def test_trainers_methods_are_its_own_after_the_last_unpatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.patch import ecosystem
    from fastadapt.patch import trainer as taught

    taught.uninstall()  # models of other tests may still be alive
    monkeypatch.setattr(ecosystem, "_alive", weakref.WeakSet())
    names = ("_load_from_checkpoint", "_load_best_model")
    own = [getattr(transformers.Trainer, name) for name in names]
    one, two = adapted("patch"), adapted("patch")
    taught_methods = [getattr(transformers.Trainer, name) for name in names]
    assert all(a is not b for a, b in zip(own, taught_methods, strict=True))
    fastadapt.unpatch(one)
    assert [getattr(transformers.Trainer, name) for name in names] == taught_methods

    # a model without adapters resumes as ever while a patched one lives
    full = {"save_strategy": "steps", "max_steps": 4}
    whole = trainer(one, tmp_path, **full)
    whole.train()
    rest = trainer(tiny.model(), tmp_path, **full)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(rest) == losses(whole)

    two.merge_and_unload()
    assert [getattr(transformers.Trainer, name) for name in names] == own


# Accelerate and a loop of one's own ---------------------------------------------------------------


def loop(model: Any, optimizer: Any, backward: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    model.train()
    for seed in range(3):
        backward(model(**tiny.batch(seed=seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    return adapter(model)


def optimizer_of(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("door", DOORS)
def test_accelerate_prepares_and_saves(door: str, fmt: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    plain = adapted(door, fmt)
    want = loop(plain, optimizer_of(plain), lambda loss: loss.backward())
    accelerator = Accelerator(cpu=True)
    model = adapted(door, fmt)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert_equal(loop(model, optimizer, accelerator.backward), want)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path, state_dict=accelerator.get_state_dict(model)
    )
    saved = {k.replace(".weight", ".default.weight"): v for k, v in files(tmp_path).items()}
    assert_equal(saved, dict(sorted(want.items())))


# TRL -------------------------------------------------------------------------------------------


def chat(folder: Path, door: str, **options: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return adapted(door, base=base, **options)


def messages() -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": f"{i} it is, friend"}]}
            for i in range(8)
        ]
    )  # fmt: skip


def sft(model: Any, folder: Path, tokenizer: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    args = settings(folder, max_steps=2, save_steps=1, optim="sgd", max_length=64, **options)
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**args), train_dataset=messages(),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parity
def test_sft_trains_as_with_peft(chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    runs = {
        "patch": chat(chat_model, "patch"), "wrapper": chat(chat_model, "wrapper"),
        "peft": chat(chat_model, "peft"), "exact": chat(chat_model, "peft").double(),
    }  # fmt: skip
    after = {}
    for name, model in runs.items():
        done = sft(model, tmp_path / name, chat_tokenizer)
        done.train()
        after[name] = adapter(model)
    assert_within_budget(after["patch"], after["peft"], after["exact"])
    assert_within_budget(after["wrapper"], after["peft"], after["exact"])
    kept = {p.name for p in (tmp_path / "patch" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in kept
    assert "model.safetensors" not in kept


@pytest.mark.slow
def test_sft_with_trls_defaults(chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    """bf16 autocast, checkpointing of activations, packing; resumed."""
    options = {"bf16": True, CHECKPOINTING: True, "packing": True, "lora_dropout": 0.1}
    dropout = {"lora_dropout": options.pop("lora_dropout")}
    whole = sft(chat(chat_model, "patch", **dropout), tmp_path, chat_tokenizer, **options)
    whole.train()
    rest = sft(chat(chat_model, "patch", **dropout), tmp_path, chat_tokenizer, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(adapter(rest.model), adapter(whole.model))


@pytest.mark.slow
@pytest.mark.parity
def test_a_model_that_trl_wrapped_with_peft_can_be_patched(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    trained = {}
    for name in ("theirs", "ours", "exact"):
        model = chat(chat_model, "peft")
        model = model.double() if name == "exact" else model
        run = sft(model, tmp_path / name, chat_tokenizer)
        if name == "ours":
            fastadapt.patch(run.model)
        run.train()
        trained[name] = adapter(run.model)
    assert_within_budget(trained["ours"], trained["theirs"], trained["exact"])


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_dpo(door: str, chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs = [{"prompt": f"say {i}", "chosen": f" {i} it is", "rejected": " no"} for i in range(8)]
    model = chat(chat_model, door)
    with torch.no_grad():
        for name, parameter in tiny.adapter_parameters(model):
            if "lora_B" in name:
                parameter.zero_()
    view = fastadapt.reference(model) if door == "patch" else None
    run = trl.DPOTrainer(
        model=model, ref_model=view,
        args=trl.DPOConfig(**settings(tmp_path, max_steps=3, save_strategy="no", max_length=64)),
        train_dataset=Dataset.from_list(pairs), processing_class=chat_tokenizer,
    )  # fmt: skip
    run.train()
    rows = [row for row in run.state.log_history if "rewards/margins" in row]
    # the policy starts as its reference: no reward, and a loss of log 2
    near = math.sqrt(torch.finfo(torch.float32).eps)
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=near)
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=near)
    assert rows[-1]["rewards/margins"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    if view is not None:
        shared = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in view.parameters()} == shared


# DDP -------------------------------------------------------------------------------------------

CASES = [("patch", "fp32"), ("patch", "nf4"), ("wrapper", "nf4")]
DDP = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests import test_trainer

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
# before there is a group: in one, transformers saves the tiny base on rank 0 only
models = {"-".join(case): test_trainer.adapted(*case) for case in test_trainer.CASES}
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
for name, model in models.items():
    after = test_trainer.three_steps(DistributedDataParallel(model), rank)
    torch.save(after, f"{folder}/{name}-{rank}.pt")
dist.destroy_process_group()
"""


def three_steps(model: Any, half: int | None = None) -> dict[str, Tensor]:
    """SGD on batches of 4; ``half``: on these two rows of each."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        batch = tiny.batch(rows=4, seed=seed)
        if half is not None:
            batch = {k: v[2 * half : 2 * half + 2] for k, v in batch.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter(model)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left the adapters that each trained."""
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(folder)], env=environment, cwd=root,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0][-3000:] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("door", "fmt"), CASES)
def test_two_processes_train_as_one(door: str, fmt: str, two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"{door}-{fmt}-{i}.pt") for i in range(2))
    assert_equal(first, second)
    exact = three_steps(in_float64(adapted("peft", fmt)))
    assert_within_budget(first, three_steps(adapted("peft", fmt)), exact)
