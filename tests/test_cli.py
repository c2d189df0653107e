# SPDX-License-Identifier: Apache-2.0
"""The command line: documents on stdout, one line for an error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.cli import main

LAYERS = 2 * 7


@dataclass
class Shell:
    """Runs a command in this process; ``document`` is what --json printed."""

    capture: pytest.CaptureFixture[str]
    code: int = 0
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: object) -> Shell:
        self.capture.readouterr()
        self.code = main([str(argument) for argument in arguments])
        self.out, self.err = self.capture.readouterr()
        return self

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def adapter(chat_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "adapter"
    code = main([
        "train", "--model", str(chat_model), "--data", str(chat_data), "--out", str(out),
        "--steps", "4", "--max-length", "128", "--lr", "1e-2", "--r", "4", "--no-plot",
    ])  # fmt: skip
    assert code == 0
    return out


def test_train_reads_yaml_and_options_win(
    shell: Shell, chat_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {chat_model}\ndata: {chat_data}\nout: {tmp_path / 'out'}\n"
        "steps: 9\nmax-length: 128\nr: 2\nplot: false\n"
    )
    shell("train", "--config", tmp_path / "run.yaml", "--steps", 2, "--seed", 5, "--json")
    assert shell.code == 0, shell.err
    report = shell.document
    assert (len(report["loss"]), report["seed"], report["settings"]["r"]) == (2, 5, 2)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert "step 2/2" in shell.err


def test_every_setting_is_an_option(shell: Shell) -> None:
    from fastadapt.patch.settings import TrainSettings

    assert shell("train", "--help").code == 0
    for field in fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')} " in shell.out


def test_inspect_reads_the_files_alone(shell: Shell, adapter: Path) -> None:
    from safetensors.torch import load_file

    document = shell("inspect", adapter, "--json").document
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {t["name"]: t["shape"] for t in document["tensors"]} == {
        name: list(tensor.shape) for name, tensor in stored.items()
    }
    assert len(stored) == 2 * LAYERS
    for tensor in document["tensors"]:
        assert tensor["norm"] == pytest.approx(float(stored[tensor["name"]].double().norm()))
    assert document["config"]["r"] == 4
    assert document["finite"] is True
    assert shell("inspect", adapter).code == 0
    assert "lora_alpha: 32" in shell.out


def test_inspect_tells_what_is_not_finite(shell: Shell, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = dict(load_file(adapter / "adapter_model.safetensors"))
    name = min(tensors)
    tensors[name] = tensors[name].fill_(torch.inf)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    document = shell("inspect", tmp_path, "--json").document
    assert [t["name"] for t in document["tensors"] if not t["finite"]] == [name]
    assert "NOT FINITE" in shell("inspect", tmp_path).out


def test_merge_writes_a_model_that_computes_the_same(
    shell: Shell, adapter: Path, chat_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import fastadapt

    document = shell("merge", adapter, "--out", tmp_path / "merged", "--json").document
    assert document["base_model"] == str(chat_model)
    ids = torch.arange(40).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    adapted = fastadapt.PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        got, want = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
        truth = adapted.double()(input_ids=ids).logits
    budget = 2 * (want - truth).norm()
    assert (got - truth).norm() <= budget
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert shell("merge", adapter, "--out", tmp_path / "merged").code == 6
    assert "--overwrite" in shell.err


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_explain_names_every_layer(
    shell: Shell, adapter: Path, chat_model: Path, what: str
) -> None:
    target = {"model": chat_model, "adapter": adapter}[what]
    assert shell("explain", target, "--json").code == 0, shell.err
    assert shell.document
    shell("explain", target)
    for name in ("q_proj", "down_proj"):
        assert name in shell.out
    assert shell("explain", target, "--tokens", "3", "--require", "1", "--json").code == 0
    assert shell.document["tokens"] == 3


def test_explain_as_a_contract(shell: Shell, chat_model: Path) -> None:
    """Embeddings are no matrix products: the error names them, after the table."""
    target = [chat_model, "--target", r".*\.(q_proj|embed_tokens)", "--require", "1"]
    assert shell("explain", *target).code == 5
    assert "runs on" in shell.out
    assert "embed_tokens: a embedding layer is not a matrix product" in shell.err


def test_doctor_checks_every_op(shell: Shell) -> None:
    from fastadapt.ops.dispatch import OPS

    assert shell("doctor", "--json").code == 0, shell.err
    document = shell.document
    checked = {row["op"] for row in document["ops"] if row["implementation"] == "reference"}
    assert checked == {op.name for op in OPS.values()}, "give the new op a case in patch/doctor.py"
    for row in document["ops"]:
        assert row["why_not"] or row["error"] <= row["budget"]
    assert shell("doctor").out.strip().endswith("healthy")


def test_doctor_notices_a_wrong_kernel(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.ops.dispatch import OPS

    op = OPS["dropout"]
    monkeypatch.setattr(op, "run", lambda x, *_: x)
    monkeypatch.setattr(op, "call", op.run)
    assert shell("doctor", "--json").code == 5
    wrong = {row["op"] for row in shell.document["ops"] if row.get("ok") is False}
    assert wrong == {"dropout"}


def failures(tmp_path: Path, model: Path, data: Path) -> list[tuple[int, str, list[object]]]:
    run = ["train", "--model", model, "--data", data, "--out", tmp_path / "o", "--no-plot"]
    (tmp_path / "bad.yaml").write_text("batchsize: 3\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (torn / "adapter_model.safetensors").write_bytes(b"\x08\x00")
    return [
        (2, "did you mean 'batch_size'", [*run, "--config", tmp_path / "bad.yaml"]),
        (2, "r must be above 0", [*run, "--r", 0]),
        (2, "data is needed", ["train", "--model", model, "--out", tmp_path / "o"]),
        (2, "no-such-module", [*run, "--max-length", 128, "--target", "no-such-module.*"]),
        (3, "No such file", [*run, "--data", tmp_path / "none.jsonl"]),
        (3, "holds no conversation", [*run, "--data", tmp_path / "empty.jsonl"]),
        (4, "no complete checkpoint", [*run, "--resume"]),
        (4, "adapter_config.json", ["inspect", tmp_path / "nowhere"]),
        (4, "cannot be read as safetensors", ["inspect", torn]),
        (4, "names no base model: give --model", ["merge", torn, "--out", tmp_path / "m"]),
        (6, "cannot write to", [*run, "--out", tmp_path / "file"]),
    ]


def test_errors_are_one_line_and_a_code(
    shell: Shell, chat_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    for code, problem, arguments in failures(tmp_path, chat_model, chat_data):
        shell(*arguments, "--json")
        assert shell.code == code, (arguments, shell.err)
        error = shell.document["error"]
        assert error["exit_code"] == code
        assert problem in error["message"]
        last = shell.err.strip().splitlines()[-1]
        assert last.startswith("fastadapt: ")
        assert problem in last
        assert "Traceback" not in shell.err
    assert "Traceback" in shell(*arguments, "--debug").err


def test_an_interrupted_run_says_how_to_continue(
    shell: Shell, chat_model: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastadapt.patch import train
    from fastadapt.patch.fit import Interrupted

    def stopped(*_: object) -> None:
        raise Interrupted(3, 9, tmp_path / "checkpoint-3")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ["train", "--model", chat_model, "--data", chat_data, "--out", tmp_path]
    for function, text in ((stopped, "--resume"), (killed, "interrupted; nothing was saved")):
        monkeypatch.setattr(train, "run", function)
        assert shell(*arguments, "--json").code == 130
        assert shell.document["error"]["exit_code"] == 130
        assert text in shell.err


def test_usage_errors(shell: Shell) -> None:
    assert shell("nonsense").code == 2
    assert shell("train", "--r", "many").code == 2
    assert "--r" in shell.err


def test_a_missing_extra_is_named() -> None:
    source = (
        "import sys\nsys.modules['typer'] = None\n"
        "from fastadapt.cli import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 5
    assert "pip install 'fastadapt[train]'" in done.stderr
