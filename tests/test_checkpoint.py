# SPDX-License-Identifier: Apache-2.0
"""Adapter files: written whole or not at all, checked whole before anything is loaded."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastadapt
from fastadapt import checkpoint
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    FastAdaptError,
    FastAdaptWarning,
    LifecycleError,
    OutputError,
    TargetError,
)
from fastadapt.files import locked
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

TENSORS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def fresh(door: Any = fastadapt.patch, **fields: Any) -> Any:
    config = fastadapt.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    return door(tiny.model(), config).eval()


def adapted(door: Any = fastadapt.patch, **fields: Any) -> Any:
    model = fresh(door, **fields)
    tiny.randomise(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch()).logits  # type: ignore[no-any-return]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


def from_wrapper(model: Any, folder: Path, **options: Any) -> Any:
    return fastadapt.PeftModel.from_pretrained(model, folder, **options)


def into_new_name(model: Any, folder: Path, **options: Any) -> Any:
    model.load_adapter(folder, "loaded", **options)
    return model


def into_same_name(model: Any, folder: Path, **options: Any) -> Any:
    model.load_adapter(folder, "default", **options)
    return model


LOADERS = {
    "from_pretrained": (tiny.model, from_wrapper),
    "load_adapter": (fresh, into_new_name),
    "load_into": (fresh, into_same_name),
}
"""The ways in: what to start with, how to load."""


def refused(folder: Path, error: type[Exception], *says: str) -> None:
    """By every way in: one error, no model changed, no warning on top."""
    for start, load in LOADERS.values():
        model = start()
        before, configs = tiny.snapshot(model), _configs(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FastAdaptWarning)
            warnings.filterwarnings("ignore", ".*is a pickle")
            with pytest.raises(error) as caught:
                load(model, folder)
        assert isinstance(caught.value, FastAdaptError)
        for text in says:
            assert text in str(caught.value)
        tiny.assert_same(model, before)
        assert _configs(model) == configs


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file; its metadata stay."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata=metadata)


# there and back


@pytest.mark.parametrize("way", LOADERS)
def test_what_is_saved_is_loaded(way: str, saved: Path) -> None:
    want = logits(adapted())
    start, load = LOADERS[way]
    model = load(start(), saved)
    model.set_adapter("loaded" if way == "load_adapter" else "default")
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_quantised_bases(fmt: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = fastadapt.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = fastadapt.patch(tiny.model(fmt=fmt), config).eval()
    model.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(tiny.model(fmt=fmt), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_loaded_for_inference_or_for_training(saved: Path) -> None:
    frozen = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.peft_config["default"].inference_mode
    live = fastadapt.PeftModel.from_pretrained(tiny.model(), saved, is_trainable=True)
    names = {n for n, _ in tiny.adapter_parameters(live)}
    assert {n for n, p in live.named_parameters() if p.requires_grad} == names
    assert not live.peft_config["default"].inference_mode
    assert json.loads((saved / CONFIG).read_text())["inference_mode"] is True


def test_saving_writes_the_adapter_and_nothing_else(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {TENSORS, CONFIG}
    assert all("lora_" in key for key in load_file(saved / TENSORS))
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~umask for p in saved.iterdir())


def test_a_gathered_state_dict(tmp_path: Path) -> None:
    """As FSDP and DeepSpeed hand it over; with the model's keys or the wrapper's."""
    for door in (fastadapt.patch, fastadapt.get_peft_model):
        model = adapted(door)
        gathered = {k: v + 1 for k, v in model.state_dict().items() if "lora_" in k}
        model.save_pretrained(tmp_path, state_dict=gathered)
        own = {k.replace(".default", "").removeprefix("base_model.model."): v
               for k, v in gathered.items()}  # fmt: skip
        file = {k.removeprefix("base_model.model."): v
                for k, v in load_file(tmp_path / TENSORS).items()}  # fmt: skip
        assert file.keys() == own.keys()
        assert all(torch.equal(file[k], own[k]) for k in own)
        gathered.popitem()
        with pytest.raises(CheckpointError, match="lacks"):
            model.save_pretrained(tmp_path / "none", state_dict=gathered)
        assert not (tmp_path / "none").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    for door in (fastadapt.patch, fastadapt.get_peft_model):
        adapted(door).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


# files that do not fit


def test_every_problem_is_in_one_error(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        gone, bent, broken, endless = sorted(tensors)[:4]
        tensors[Q.replace("layers.0", "layers.7")] = tensors.pop(gone)
        tensors[bent] = torch.zeros(3, 5)
        tensors[broken][0, 0] = float("nan")
        tensors[endless][0, 0] = float("inf")

    names = sorted(load_file(saved / TENSORS))[:4]
    rewrite(saved, spoil)
    refused(
        saved, CheckpointError, f"missing: {names[0]}", "unexpected: base_model.model.model.layers",
        f"shape of {names[1]}: expected", "got (3, 5)", f"not finite: {names[2]}",
        f"not finite: {names[3]}",
    )  # fmt: skip


def test_a_renamed_key_is_missing_and_unexpected_with_its_neighbour(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q.replace("q_proj", "q_prj"): t.pop(Q)}))
    refused(saved, CheckpointError, f"missing: {Q}", f"(near {Q})")


@pytest.mark.parametrize("how", ["half", "none", "more"])
def test_files_with_other_keys(how: str, saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if how == "more":
            tensors["something.else"] = torch.ones(1)
        for key in sorted(tensors)[: {"half": len(tensors) // 2, "none": None, "more": 0}[how]]:
            del tensors[key]

    rewrite(saved, change)
    refused(saved, CheckpointError, "unexpected" if how == "more" else "missing")


def test_long_lists_of_problems_are_cut(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda t: [t.update({f"k{i}": torch.ones(1)}) for i in range(5000)])
    with pytest.raises(CheckpointError, match="more") as caught:
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert len(str(caught.value)) < 4000


def test_leniently_what_fits_is_loaded_with_a_warning(saved: Path) -> None:
    want = load_file(saved / TENSORS)
    rewrite(saved, lambda t: t.update({"something.else": t.pop(Q)}))
    for start, load in LOADERS.values():
        with pytest.warns(FastAdaptWarning, match=r"missing(.|\n)*unexpected: something.else"):
            model = load(start(), saved, strict=False)
        name = "loaded" if load is into_new_name else "default"
        found = {n.replace(f".{name}", ""): p for n, p in model.named_parameters() if name in n}
        for key, value in want.items():
            live = found.get(key, found.get(key.removeprefix("base_model.model.")))
            assert torch.equal(live, value) == (key != Q), key


def test_the_report_names_what_did_not_fit(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({"something.else": t.pop(Q)}))
    with pytest.warns(FastAdaptWarning):
        report = adapted().load_adapter(saved, "loaded", strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([Q], ["something.else"])
    assert [p.partition(":")[0] for p in report.problems] == ["missing", "unexpected"]


def test_shapes_are_never_lenient(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q: torch.zeros(4, 63)}))
    with pytest.raises(CheckpointError, match=r"expected \(4, 64\), got \(4, 63\)"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved, strict=False)


def test_an_adapter_that_changes_nothing_warns(tmp_path: Path) -> None:
    model = fastadapt.patch(tiny.model(), fastadapt.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(FastAdaptWarning, match="changes nothing"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path)


# another base


def test_an_adapter_of_another_size(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = tiny.model().config
    config.hidden_size, config.intermediate_size = 32, 64
    config.head_dim = 8
    other = fastadapt.patch(
        LlamaForCausalLM(config), fastadapt.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    tiny.randomise(other)
    other.save_pretrained(tmp_path)
    refused(tmp_path, CheckpointError, "shape of", "wrong base: hidden_size is 64", "on 32")


def test_an_adapter_of_another_model_of_the_same_size(tmp_path: Path) -> None:
    """What PEFT loads without a word."""
    base = tiny.model()
    with torch.no_grad():
        base.model.embed_tokens.weight.normal_()
    model = fastadapt.patch(base, fastadapt.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomise(model)
    model.save_pretrained(tmp_path)
    refused(tmp_path, CheckpointError, "wrong base: the embeddings are others")
    with pytest.warns(FastAdaptWarning, match="wrong base"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path, strict=False)


def test_an_adapter_of_another_architecture(saved: Path) -> None:
    for kind in ("gpt2", "bert"):
        model = tiny.model(kind)
        before = tiny.snapshot(model)
        with pytest.raises((TargetError, CheckpointError)):
            fastadapt.PeftModel.from_pretrained(model, saved)
        tiny.assert_same(model, before)


@pytest.mark.parametrize("fmt", ["bf16", "nf4", "int8"])
def test_the_same_base_in_another_format_is_the_same(fmt: str, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAdaptWarning)
        fastadapt.PeftModel.from_pretrained(tiny.model(fmt=fmt), saved)


def test_a_resized_vocabulary_is_the_same_base(saved: Path) -> None:
    model = tiny.model()
    model.resize_token_embeddings(tiny.VOCABULARY + 16, mean_resizing=False)
    fastadapt.PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize("junk", ["", "{", "[]", "null", '{"embedding": 5}', '{"embedding": []}',
                                  '{"embedding": ["x"]}', "[" * 100_000])  # fmt: skip
def test_metadata_that_are_no_fingerprint_say_nothing(junk: str, saved: Path) -> None:
    save_file(load_file(saved / TENSORS), saved / TENSORS, metadata={"fastadapt_base": junk})
    fastadapt.PeftModel.from_pretrained(tiny.model(), saved)


# files that are none


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 200, -1])
def test_truncated_files(keep: int, saved: Path) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[:keep])
    refused(saved, CheckpointError, TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1 << 40).to_bytes(8, "little") + b"{" * 100,
        (101_000_000).to_bytes(8, "little") + b" " * 1000,
        (2).to_bytes(8, "little") + b"[]",
        (16).to_bytes(8, "little") + b"{" * 16,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04." * 10,
    ],
    ids=["2^62", "2^40", "101MB", "list", "nested", "zip", "pickle"],
)
def test_headers_that_lie(data: bytes, saved: Path) -> None:
    (saved / TENSORS).write_bytes(data)
    refused(saved, CheckpointError, TENSORS)


def test_offsets_that_lie(saved: Path) -> None:
    header = {Q: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(header).encode()
    (saved / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    refused(saved, CheckpointError, TENSORS)


def test_no_tensors_at_all(saved: Path) -> None:
    (saved / TENSORS).unlink()
    refused(saved, CheckpointError, TENSORS, BIN)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, CONFIG)


def test_a_small_file_cannot_ask_for_gigabytes(saved: Path) -> None:
    """PEFT allocates 3 GB for r = 3000000 before it looks at the file; this is refused unread,
    and so is a rank that is allowed and not the file's."""
    values = json.loads((saved / CONFIG).read_text())
    for r, error in ((3_000_000, ConfigError), (60_000, CheckpointError)):
        (saved / CONFIG).write_text(json.dumps({**values, "r": r}))
        model = tiny.model()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(error):
            fastadapt.PeftModel.from_pretrained(model, saved)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        # 60000 x 64 floats in four A alone would be 60 MB; units are KiB
        assert grown < 8 << 10


class Payload:
    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_cannot_run_code(write: Any, saved: Path, tmp_path: Path) -> None:
    (saved / TENSORS).unlink()
    with (saved / BIN).open("wb") as file:
        write({Q: Payload(tmp_path / "ran")}, file)
    refused(saved, CheckpointError, BIN)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
def test_pickles_of_something_else(content: Any, saved: Path) -> None:
    (saved / TENSORS).unlink()
    torch.save(content, saved / BIN)
    refused(saved, CheckpointError)


def test_truncated_pickles(saved: Path) -> None:
    torch.save(load_file(saved / TENSORS), saved / BIN)
    (saved / TENSORS).unlink()
    data = (saved / BIN).read_bytes()
    for keep in (0, 10, len(data) // 2):
        (saved / BIN).write_bytes(data[:keep])
        refused(saved, CheckpointError, BIN)


# saves that cannot be


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("door", [fastadapt.patch, fastadapt.get_peft_model])
def test_values_that_are_not_finite_are_not_saved(door: Any, tmp_path: Path) -> None:
    model = adapted(door)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        next(p for n, p in tiny.adapter_parameters(model))[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite.*q_proj\.lora_A"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_parameters_that_are_elsewhere_are_not_saved(tmp_path: Path) -> None:
    """ZeRO-3 leaves empty tensors behind; a file of those would be an adapter of nothing."""
    model = adapted()
    for _, parameter in tiny.adapter_parameters(model):
        parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match="gathered"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_adapters_are_checked_before_one_is_written(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", fastadapt.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in tiny.adapter_parameters(model):
            if ".other." in name:
                parameter.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="'other'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(LifecycleError, match="nobody"):
        adapted().save_pretrained(tmp_path, selected_adapters=["nobody"])
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"),
                  Path("/dev/null")):  # fmt: skip
        with pytest.raises(OutputError, match=r"could not be written|expected a directory"):
            adapted().save_pretrained(where)
    assert (tmp_path / "file").read_text() == "mine"


def child(work: Callable[[], Any]) -> int:
    """A copy of this process that does ``work`` and leaves (0: it raised nothing)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_problems_of_both_files_are_in_one_error(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "r": 3_000_000}))
    (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:9])
    refused(saved, CheckpointError, "3000000", "expected a safetensors file")


def test_a_key_mapping_is_that_of_peft(saved: Path) -> None:
    want = logits(adapted())
    rewrite(saved, lambda t: [t.update({k.replace("self_attn", "attention"): t.pop(k)})
                              for k in list(t)])  # fmt: skip
    mapping = {r"\.attention\.": ".self_attn.", "self_attn": "never"}
    for start, load in LOADERS.values():
        model = load(start(), saved, key_mapping=mapping)
        model.set_adapter("loaded" if load is into_new_name else "default")
        assert torch.equal(logits(model), want)
    with pytest.raises(CheckpointError, match="one name"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved, key_mapping={r".*": "same"})


def test_mismatched_sizes_are_left_out_when_asked(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q: torch.zeros(4, 63)}))
    for start, load in LOADERS.values():
        with pytest.warns(FastAdaptWarning, match=r"ignore_mismatched_sizes(.|\n)*\(4, 63\)"):
            load(start(), saved, ignore_mismatched_sizes=True)


def test_a_header_too_long_is_refused_unread(saved: Path) -> None:
    size = 64 << 20
    with (saved / TENSORS).open("wb") as file:
        file.write(size.to_bytes(8, "little") + b'{"__metadata__":{}}')
        file.truncate(size + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(saved, CheckpointError, "header of 67108864 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_pickle_cannot_unpack_to_gigabytes(saved: Path) -> None:
    torch.save({Q: torch.zeros(1 << 22)}, saved / "plain")
    with (
        zipfile.ZipFile(saved / "plain") as old,
        zipfile.ZipFile(saved / BIN, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    (saved / TENSORS).unlink()
    refused(saved, CheckpointError, "compressed")


def test_a_save_that_died_after_its_commit_is_read_as_the_new_one(saved: Path) -> None:
    """The tensors' file is renamed first: the config that it names is beside it then."""
    old = (saved / CONFIG).read_bytes()
    model = adapted(lora_alpha=32)
    model.save_pretrained(saved)
    with safe_open(saved / TENSORS, "pt") as file:
        digest = file.metadata()["fastadapt_config"]
    (saved / CONFIG).rename(saved / f".{CONFIG}.{digest}")
    (saved / CONFIG).write_bytes(old)
    loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert loaded.peft_config["default"].lora_alpha == 32
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(saved)
    assert {p.name for p in saved.iterdir()} == {TENSORS, CONFIG}


def test_a_config_that_was_edited_after_the_save_counts(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "lora_alpha": 3}))
    loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert loaded.peft_config["default"].lora_alpha == 3


def test_an_old_safetensors_file_does_not_hide_a_new_bin(saved: Path) -> None:
    adapted().save_pretrained(saved, safe_serialization=False)
    assert {p.name for p in saved.iterdir()} == {BIN, CONFIG}


def test_two_writers_take_turns_and_one_that_stays_is_an_error(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved)
    monkeypatch.setattr("fastadapt.files.LOCK_SECONDS", 0.1)
    with locked(saved), pytest.raises(OutputError, match="another process is saving"):
        adapted().save_pretrained(saved)
    assert files(saved) == before
    adapted().save_pretrained(saved)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_full_disk_leaves_the_old_files(safe: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half way."""
    model = adapted(target_modules="all-linear")
    model.save_pretrained(tmp_path, safe_serialization=safe)
    before = files(tmp_path)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OutputError, match="could not be written"):
            model.save_pretrained(tmp_path, safe_serialization=safe)

    assert os.waitpid(child(save), 0)[1] == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "kills", [pytest.param(8), pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_while_saving(kills: int, saved: Path) -> None:
    """Whenever the process dies, what loads is one save: its values go with its config."""
    model = adapted()
    config = model.peft_config["default"]

    def save_as(i: int) -> None:
        config.lora_alpha = i
        with torch.no_grad():
            for _, parameter in tiny.adapter_parameters(model):
                parameter.fill_(i)
        model.save_pretrained(saved)

    save_as(1)
    seen = set()
    for i in range(kills):
        told, tell = os.pipe()

        def save_on_and_on(start: int = 2 + 1000 * i, tell: int = tell) -> None:
            for value in range(start, start + 10**6):
                os.write(tell, b".")
                save_as(value)

        pid = child(save_on_and_on)
        os.read(told, 1)
        # a save takes some milliseconds: these delays fall all over the first few
        time.sleep(0.0011 * (7 * i % 40))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told), os.close(tell)
        file = checkpoint.open_adapter(saved)
        checkpoint.check(tiny.model(), file)
        values = {v.unique().item() for v in file.held.values()}
        assert values == {float(file.config.lora_alpha)}  # type: ignore[attr-defined]
        seen |= values
    assert len(seen) > 1


def _configs(model: Any) -> Any:
    return {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()}
