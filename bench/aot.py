# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for NVIDIA GPUs that need not be there, and count what came out.

    python bench/aot.py                     all, into bench/results/aot/table.json + docs/kernels.md
    python bench/aot.py --only rotate       the same for the kernels of this name alone
    python bench/aot.py --quick --out x.json    the variants of the test run

Registers, spills, shared memory, tensor-core instructions, instructions an element. The laws: no
spill; tensor cores in every 16-bit product; shared memory that fits; NF4 decode in at most 9.2
instructions an element on sm_90, 7.5 in the products with the pair table.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from fastadapt.kernels.builds import DECODE_LIMIT, PAIR_LIMIT, ROWS, Row, Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "aot" / "table.json"
PAGE = ROOT / "docs" / "kernels.md"

SHARED_LIMIT = {80: 163, 86: 99, 90: 227, 100: 227}
"""sm -> kB a program may have."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TENSOR_CORE = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Job(NamedTuple):
    row: int
    dtype: str
    variant: int
    arch: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="the variants of the test run; needs --out")  # fmt: skip
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", choices=SHARED_LIMIT)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write here instead of the committed table")
    known = parser.parse_args()
    if known.out is None and (known.quick or known.arch):
        parser.error("--quick and --arch compile a part of a kernel: expected --out as well")
    archs = known.arch or list(SHARED_LIMIT)
    todo = [j for j in jobs(known.quick) if known.only in _name(j) and j.arch in archs]
    table = measure(todo, known.jobs)
    broken = [f"{key(row)}: {law}" for row in table["rows"] for law in laws(row)]
    out = known.out or TABLE
    if known.out is None:
        table = merged(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_as_json(table), encoding="utf-8")
    if known.out is None:
        PAGE.write_text(page(table), encoding="utf-8")
    print(f"{len(table['rows'])} compiled by triton {table['triton']}, {len(broken)} laws broken")
    print("\n".join(broken), file=sys.stderr)
    return 1 if broken and known.out is None else 0


def merged(table: dict[str, Any]) -> dict[str, Any]:
    """The committed table with the kernels of this one in the place of its own, as long as one
    compiler made both; in the order of ROWS."""
    held = json.loads(TABLE.read_text(encoding="utf-8"))
    new = {row["kernel"] for row in table["rows"]}
    order = {row.kernel.__name__: i for i, row in enumerate(ROWS)}
    if held["triton"] != table["triton"]:
        if set(order) != new:
            raise SystemExit(
                f"expected triton {held['triton']}, which made the table, or all kernels anew; got "
                f"{table['triton']} and {sorted(new)}"
            )
        return table
    kept = [row for row in held["rows"] if row["kernel"] not in new and row["kernel"] in order]
    rows = sorted([*kept, *table["rows"]], key=lambda row: order[row["kernel"]])
    return table | {"rows": rows}


def jobs(quick: bool) -> Iterator[Job]:
    """Every variant in bf16 for sm_80, sm_90 and sm_100, in fp32 for sm_80 and sm_90.

    fp16 differs from bf16 in a type alone, and sm_86 from sm_80 in how much shared memory there is:
    of these only the quick variants are compiled. ``quick``: those, in bf16; for all but sm_90 the
    first of each kernel."""
    for r, row in enumerate(ROWS):
        for dtype, archs in (("bf16", (80, 86, 90, 100)), ("fp16", (80, 90)), ("fp32", (80, 90))):
            first = True
            for v, variant in enumerate(row.variants(dtype)):
                for arch in archs:
                    sampled = variant.quick and dtype == "bf16" and (first or arch == 90)
                    whole = variant.quick or (dtype != "fp16" and arch != 86)
                    if sampled if quick else whole:
                        yield Job(r, dtype, v, arch)
                first = first and not variant.quick


def measure(todo: Iterable[Job], workers: int = 1) -> dict[str, Any]:
    # anew each time: a table must not show what an earlier compiler left on the disk
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if workers == 1:
            rows = [compiled(job) for job in todo]
        else:
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                rows = list(pool.map(compiled, todo, chunksize=8))
    return {"triton": triton.__version__, "rows": rows}


def compiled(job: Job) -> dict[str, Any]:
    """Compile one variant and read its machine code."""
    row, variant = _variant(job)
    kernel = row.kernel
    arguments = _arguments(row, variant, job.dtype)
    fixed = {k: v for k, v in variant.fixed.items() if k not in OPTIONS}
    fixed |= {name: int(kind) for name, kind in arguments.items() if kind.isdigit()}
    signature = {
        name: "constexpr" if name in fixed else arguments[name].rstrip("?")
        for name in kernel.arg_names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] in "*i" and not arguments[name].endswith("?")
    }
    source = ASTSource(kernel, signature, fixed, divisible)
    options = {k: v for k, v in variant.fixed.items() if k in OPTIONS}
    binary = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    ptx, code = binary.asm["ptx"], instructions(binary.asm["cubin"])
    opcodes = [_opcode(i) for i in code if isinstance(i, str)]
    tensor = {name: ptx.count(word) for word, name in TENSOR_CORE.items() if word in ptx}
    loop = innermost(code, "MMA" if tensor else "FFMA") if variant.dots else opcodes
    threads = 32 * variant.fixed["num_warps"]
    # on sm_100 one warp multiplies and others move: a count of one loop says nothing
    counted = variant.elements and loop and job.arch < 100
    return {
        "kernel": kernel.__name__,
        "variant": variant.name,
        "dtype": job.dtype,
        "arch": job.arch,
        "fixed": {k: v for k, v in variant.fixed.items() if isinstance(v, int)},
        **resources(binary.asm["cubin"]),
        "spills": sum(i in ("LDL", "STL") for i in opcodes),
        "shared": binary.metadata.shared,
        "tensor_core": tensor,
        "dots": variant.dots,
        "instructions": len(opcodes),
        "per_element": round(len(loop) * threads / variant.elements, 2) if counted else None,
        "limit": variant.limit if variant.decodes else None,
    }


def laws(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of the table."""
    broken = []
    if row["stack"] or row["local"] or row["spills"]:
        broken.append(f"{row['spills']} spills, a stack of {row['stack']} B")
    if row["dots"] and row["dtype"] != "fp32" and not row["tensor_core"]:
        broken.append("no tensor-core instruction")
    # what is compiled for sm_80 runs on sm_86 too
    if row["shared"] > SHARED_LIMIT[86 if row["arch"] == 80 else row["arch"]] * 1024:
        broken.append(f"{row['shared']} B of shared memory")
    if row["limit"] and row["arch"] == 90 and not (row["per_element"] or 99) <= row["limit"]:
        broken.append(f"{row['per_element']} instructions an element, at most {row['limit']}")
    return broken


def key(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['variant']} {row['dtype']} sm_{row['arch']}"


def page(table: dict[str, Any]) -> str:
    """The table in Markdown: sm_90 in full, and the highest register count elsewhere."""
    rows = {key(row): row for row in table["rows"]}
    lines = [
        "# What the kernels compile to",
        "",
        f"Written by `python bench/aot.py` with triton {table['triton']}; the raw figures, with "
        "tile sizes, are in `bench/results/aot/table.json`, and `tests/test_aot.py` makes them "
        "again. Nothing here was timed: a kernel is compiled ahead of time, without a GPU.",
        "",
        "- No variant spills a register, on sm_80, sm_86, sm_90 or sm_100.",
        "- Every product of 16-bit matrices uses tensor cores. A product of fp32 matrices is in "
        "full fp32 precision, on plain FMA units.",
        f"- Decoding NF4 takes at most {DECODE_LIMIT} instructions an element on sm_90, and at "
        f"most {PAIR_LIMIT} in the products with the pair table "
        "(`FASTADAPT_NF4_TABLE=pair`: the codebook is rounded to the 16-bit type before it is "
        "scaled; the default is exact).",
        "- fp16 compiles to what bf16 does, and sm_86 to what sm_80 does: of these fewer variants "
        "are compiled, and what sm_80 asks of shared memory must fit sm_86.",
        "",
        "*instr/element*: SASS instructions for each element of the main loop's tile (of the "
        "whole program, where there is no loop) on sm_90, addresses and loop included. Registers "
        "are those of a thread; shared memory is a program's.",
    ]  # fmt: skip
    head = ["variant", "dtype", "warps", "registers sm_80 / 86 / 90 / 100", "shared kB",
            "tensor core", "instr/element"]  # fmt: skip
    for kernel in dict.fromkeys(row["kernel"] for row in table["rows"]):
        lines += ["", f"## {kernel}", "", _line(head), _line(["---"] * len(head))]
        for row in rows.values():
            if row["kernel"] != kernel or row["arch"] != 90:
                continue
            others = [rows.get(key(row | {"arch": arch})) for arch in SHARED_LIMIT]
            tensor = " ".join(f"{n} {kind}" for kind, n in row["tensor_core"].items())
            lines.append(_line([
                row["variant"] or "-", row["dtype"], row["fixed"]["num_warps"],
                " / ".join(str(other["registers"]) if other else "-" for other in others),
                f"{row['shared'] / 1024:.1f}", tensor or "-", row["per_element"] or "-",
            ]))  # fmt: skip
    return "\n".join(lines) + "\n"


# machine code


def instructions(cubin: bytes) -> list[str | tuple[str]]:
    """The instructions in order, NOP left out; a label is a tuple."""
    found: list[str | tuple[str]] = []
    for line in _tool("nvdisasm", ["-c"], cubin).splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            found.append((label[1],))
        elif (code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and code[1] != "NOP":
            found.append(code[1])
    return found


def innermost(code: list[str | tuple[str]], opcode: str) -> list[str]:
    """The smallest loop with such an instruction; empty where there is none."""
    labels = {i[0]: n for n, i in enumerate(code) if isinstance(i, tuple)}
    best: list[str] = []
    for n, instruction in enumerate(code):
        if isinstance(instruction, tuple) or "BRA" not in instruction:
            continue
        target = re.search(r"\((\.L_\w+)\)", instruction)
        start = labels.get(target[1], n + 1) if target else n + 1
        body = [_opcode(i) for i in code[start : n + 1] if isinstance(i, str)]
        if any(opcode in i for i in body) and (not best or len(body) < len(best)):
            best = body
    return best


def resources(cubin: bytes) -> dict[str, int]:
    """registers a thread, bytes of stack and of local memory."""
    text = _tool("cuobjdump", ["-res-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {text[-300:]!r}")
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


# private


def _variant(job: Job) -> tuple[Row, Variant]:
    row = ROWS[job.row]
    return row, list(row.variants(job.dtype))[job.variant]


def _name(job: Job) -> str:
    return str(ROWS[job.row].kernel.__name__)


def _arguments(row: Row, variant: Variant, dtype: str) -> dict[str, str]:
    pairs = (part.split() for part in row.signature.replace("*D", f"*{dtype}").split(","))
    return {name: kind for kind, name in pairs} | dict(variant.types)


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def _tool(name: str, arguments: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _as_json(table: dict[str, Any]) -> str:
    """One row a line."""
    rows = ",\n  ".join(json.dumps(row) for row in table["rows"])
    return f'{{"triton": "{table["triton"]}", "rows": [\n  {rows}\n]}}\n'


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
