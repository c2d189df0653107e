# SPDX-License-Identifier: Apache-2.0
"""Who may import whom (docs/architecture.md, "Rooms"), and what `import fastadapt` must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Room(NamedTuple):
    """What the files of one room may import. `errors` and the room itself are always allowed.

    rooms: rooms of fastadapt
    eager: third parties when the module is imported
    lazy:  third parties inside functions and under TYPE_CHECKING, "*" for all
    types: more rooms, under TYPE_CHECKING only
    """

    rooms: str = ""
    eager: str = "torch"
    lazy: str = ""
    types: str = ""


METHOD = Room("base adapter combine config inits ops problems targets tying", types="layer")
MODEL = [
    "layer",
    "inject",
    "refusals",
    "model",
    "modules_to_save",
    "adapter_file",
    "checkpoint",
    "saving",
]
MODEL += ["refusals", "slots", "fingerprint", "targets", "weighted", "explain", "kbit", "reference"]
MODEL += ["penalties", "eva", "plain_lora", "dialects", "dialect_paths", "tensor_files"]
MODEL += ["dialect_writers", "constants", "freezing", "hollow", "merge", "rows", "values"]
MODEL += ["parameter", "layer_class", "invocation", "recompute", "attention", "replication"]
MODEL += ["tying"]
CORE = Room(
    " ".join(["base adapter combine config files inits kinds methods ops", *MODEL]),
    lazy="safetensors huggingface_hub transformers peft rich tqdm",
)
OUTER = Room(lazy="*")

ROOMS = {
    "errors": Room(eager=""),
    "ops": Room(),
    "kernels": Room(eager="torch triton"),
    "weights": Room("ops", lazy="bitsandbytes gptqmodel hqq torchao aqlm eetq"),
    "kinds": Room(),
    "base": Room("weights kinds ops", types="adapter"),
    "config": Room("files methods problems targets", lazy="peft"),
    "problems": Room(eager=""),
    "files": Room(lazy="huggingface_hub"),
    "combine": Room(),
    "adapter": METHOD,
    "methods": METHOD._replace(lazy="numpy"),  # PEFT draws some places with its generator
    "inits": METHOD._replace(lazy="bitsandbytes safetensors tqdm"),
    "prompts": METHOD,
    "unbuilt": Room("config"),
    "routers": METHOD,
    "optimizers": Room(lazy="bitsandbytes"),
    **dict.fromkeys(MODEL, CORE),
    # a parameter has no layer that a kind and a format could claim: it is asked for by its name
    "parameter": CORE._replace(rooms=f"{CORE.rooms} weights"),
    "targets": CORE._replace(eager="torch regex"),
    "peft_model": OUTER,
    "tuner": OUTER,
    "joint": OUTER,
    "compat": OUTER,
    "patch": OUTER,
    "cli": OUTER,
    "testing": OUTER,
    "__init__": OUTER,
}
NOBODY_IMPORTS = ("peft_model", "tuner", "joint", "compat", "patch", "cli", "testing")
# These alone may open any room, and each other.
DOORS = (*NOBODY_IMPORTS, "__init__")
# Of these, other rooms see the package, never one of its modules.
REGISTRIES = ("kinds", "methods", "weights")


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool
    typing: bool


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "fastadapt", "fastadapt"),
                            (ROOT / "kernels" / "fused", "fastadapt.kernels")):  # fmt: skip
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str, source: str, *, package: bool = False) -> Iterator[Import]:
    """Every import of a source; `from package import module` names the module."""
    here = module.split(".") if package else module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                target = inner if inner in MODULES else base
                yield Import(target, node.lineno, lazy, typing)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            lazy = typing = True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing)

    yield from visit(ast.parse(source), False, False)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(module: str, source: str, *, package: bool = False) -> list[str]:
    name = room_of(module)
    if name not in ROOMS:
        return [f"{module}: no room of that name; give {name!r} a line in ROOMS"]
    room, found = ROOMS[name], []

    def broken(entry: Import, why: str) -> None:
        found.append(f"{module}:{entry.line}: imports {entry.target}: {why}")

    lazy_third_parties = set()
    for entry in imports(module, source, package=package):
        top = entry.target.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top == "fastadapt":
            other = room_of(entry.target)
            if other in (name, "errors") or name in DOORS:
                continue
            open_rooms = f"{room.rooms} {room.types}" if entry.typing else room.rooms
            if other in NOBODY_IMPORTS or other not in open_rooms.split():
                broken(entry, f"{name} may import {open_rooms or 'no other room'}")
            elif other in REGISTRIES and entry.target.count(".") > 1:
                broken(entry, f"only the package fastadapt.{other} is open, not its modules")
            continue
        allowed = room.eager.split()
        if entry.lazy:
            allowed += room.lazy.split()
            lazy_third_parties.add(top)
        if top not in allowed and not (entry.lazy and room.lazy == "*"):
            broken(entry, f"{name} may import {allowed} {'here' if entry.lazy else 'at import'}")
    if name == "weights" and len(lazy_third_parties - {"torch"}) > 1:
        found.append(f"{module}: one format, one library; it imports {sorted(lazy_third_parties)}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_rule_who_imports_whom(module: str) -> None:
    path = MODULES[module]
    package = path.name == "__init__.py"
    found = violations(module, path.read_text(encoding="utf-8"), package=package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastadapt.ops.low_rank", "import peft"),
        ("fastadapt.ops.low_rank", "def f():\n    import triton"),
        ("fastadapt.ops.low_rank", "from fastadapt.base import Base"),
        ("fastadapt.kernels.low_rank", "from fastadapt.ops import bits"),
        ("fastadapt.methods.lora", "from fastadapt.weights import FORMATS"),
        ("fastadapt.methods.lora", "from ..model import AdaptedModel"),
        ("fastadapt.methods.lora", "def f():\n    import transformers"),
        ("fastadapt.layer", "import fastadapt.methods.lora"),
        ("fastadapt.checkpoint", "import safetensors.torch"),
        ("fastadapt.weights.bnb", "import bitsandbytes"),
        ("fastadapt.weights.bnb", "def f():\n    import hqq\ndef g():\n    import bitsandbytes"),
        ("fastadapt.model", "def f():\n    from fastadapt.patch import transformers"),
        ("fastadapt.errors", "import torch"),
        ("fastadapt.patch.peft", "import peft"),
        ("fastadapt.methods.lora", "from fastadapt.layer import AdaptedLayer"),
        ("fastadapt.methods.lora", "if TYPE_CHECKING:\n    from fastadapt.model import Model"),
        ("fastadapt.nowhere", "import math"),
    ],
)
def test_rule_checker_catches(module: str, source: str) -> None:
    assert violations(module, source), f"{source!r} in {module} should break a rule"


def test_rule_no_cycles() -> None:
    """The modules can be put in an order where each imports only earlier ones."""
    graph = {
        module: {
            entry.target
            for entry in imports(module, path.read_text(encoding="utf-8"),
                                 package=path.name == "__init__.py")
            if not entry.lazy and entry.target in MODULES and entry.target != module
        }
        for module, path in MODULES.items()
    }  # fmt: skip
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_rule_tests_and_bench_use_no_private_names(folder: str) -> None:
    private = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastadapt"):
                private += [f"{path.name}:{node.lineno}: {a.name}" for a in node.names
                            if a.name.startswith("_") and a.name != "_C"]  # fmt: skip
    assert not private, "\n".join(private)


def test_rule_kernels_is_no_package() -> None:
    """transformers, trl and bitsandbytes do `import kernels`: ours must not answer."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# What follows runs in a fresh process each: what is imported here already would hide it.

SNAPSHOT = '''
import sys

def snapshot(packages):
    """(owner, attribute) -> value, of all modules of some packages and of the classes in them."""
    seen, owners = {}, {}
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] in packages:
            owners[name] = module
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__.split(".")[0] in packages:
                    owners[value.__module__ + "." + value.__qualname__] = value
    for name, owner in owners.items():
        for key, value in list(vars(owner).items()):
            if not key.startswith(("__", "_abc_")):
                seen[name, key] = value
    return seen

def changed(before, packages):
    after = snapshot(packages)
    modules = {id(module) for module in sys.modules.values()}
    owners = {owner for owner, _ in before}
    gone = [key for key in before if key not in after]
    other = [key for key in before if key in after and after[key] is not before[key]]
    new = [key for key in after if key not in before and key[0] in owners
           and id(after[key]) not in modules]
    return gone + other + new
'''

HIDE = '''
import sys

class Hidden:
    """A finder in front of another one, for which some packages are not installed."""
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)
    def find_distributions(self, context):
        if context.name and context.name.replace("-", "_") in self.names:
            return iter(())
        find = getattr(self.finder, "find_distributions", None)
        return find(context) if find else iter(())
    def __getattr__(self, name):
        return getattr(self.finder, name)

def hide(*names):
    sys.meta_path[:] = [Hidden(finder, names) for finder in sys.meta_path]
'''

TINY_LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
))
tokens = torch.arange(12).reshape(2, 6)
loss = model(input_ids=tokens, labels=tokens).loss
"""


def run(source: str) -> str:
    """Runs a source in a fresh interpreter, in the repository root; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light() -> None:
    run("""
import sys
import torch

before = set(sys.modules)
import fastadapt
heavy = {"transformers", "peft", "trl", "bitsandbytes", "triton", "datasets", "accelerate",
         "safetensors", "huggingface_hub", "matplotlib", "rich", "typer", "yaml"}
loaded = {name.split(".")[0] for name in set(sys.modules) - before} & heavy
if loaded:
    sys.exit(f"import fastadapt imports {sorted(loaded)}")
""")


def test_snapshot_sees_changes() -> None:
    printed = run(f"""{SNAPSHOT}
import torch
before = snapshot({{"torch"}})
torch.nn.Linear.forward = lambda self, x: x
torch.nn.functional.linear = None
torch.nn.functional.extra = 1
del torch.nn.functional.relu
print(sorted(key for _, key in changed(before, {{"torch"}}) if key in
             ("forward", "linear", "extra", "relu")))
""")
    assert set(ast.literal_eval(printed)) == {"extra", "forward", "linear", "relu"}


def test_import_changes_nothing() -> None:
    run(f"""{SNAPSHOT}
import torch, transformers, peft, trl, bitsandbytes
from transformers import LlamaForCausalLM, Trainer
from trl import SFTTrainer

packages = {{"torch", "transformers", "peft", "trl", "bitsandbytes"}}
before = snapshot(packages)
import fastadapt
found = changed(before, packages)
if found:
    sys.exit(f"import fastadapt changed {{sorted(map(str, found))[:20]}}")
""")


def test_public_names_are_not_hidden_by_modules() -> None:
    """`fastadapt.patch` is a function and a package: importing the package must not replace it."""
    run(f"""
import importlib, sys
import fastadapt
for module in {sorted(name for name in MODULES if ".kernels" not in name)}:
    importlib.import_module(module)
hidden = [name for name in fastadapt.__all__ if isinstance(getattr(fastadapt, name), type(sys))]
if hidden:
    raise SystemExit(f"a module took the place of {{hidden}}")
""")


def test_works_without_optional_packages() -> None:
    """Patch and train a step where peft, triton and bitsandbytes are not installed."""
    run(f"""{HIDE}
hide("peft", "triton", "bitsandbytes")
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in ("peft", "triton", "bitsandbytes"))
{TINY_LLAMA}
import fastadapt

fastadapt.patch(model, fastadapt.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
model(input_ids=tokens, labels=tokens).loss.backward()
missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
if missing or not any(p.requires_grad for p in model.parameters()):
    sys.exit(f"no gradient for {{missing}}")
""")


def test_transformers_builds_a_model_from_the_root() -> None:
    """The repository root first on sys.path, where `import kernels` would find our folder."""
    run(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
{TINY_LLAMA}
loss.backward()
""")
