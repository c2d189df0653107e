# SPDX-License-Identifier: Apache-2.0
"""results/cpu/methods.json as the table of docs/methods.md.

python bench/methods_table.py           writes it there
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench_methods import ROWS, ratios

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "methods.json"
DOCUMENT = ROOT / "docs" / "methods.md"
MARKS = "<!-- table: python bench/methods_table.py -->\n", "<!-- end of the table -->\n"
COLUMNS = ("time/lora", "peak/lora", "time/peft", "peak/peft")


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    DOCUMENT.write_text(before + section() + after, encoding="utf-8")


def section() -> str:
    """What stands between the marks, with them; nothing without results."""
    held = table(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.exists() else ""
    return MARKS[0] + held + MARKS[1]


def table(found: dict[str, Any]) -> str:
    """Rows from the slowest; what PEFT cannot do has its reason."""
    where, rows = found["machine"], found["rows"]
    lora = [ms for row in rows.values() for ms in row["lora"]["ms"]]
    ordered = sorted(rows, key=lambda row: -ratios(rows[row]).get("time/lora", 0))
    said = [
        f"{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}, "
        f"peft {where['versions']['peft']}; {found['shapes']}, {found['batch']} x "
        f"{found['length']} tokens; LoRA's own step is {statistics.median(lora):.0f} ms, over all "
        f"rounds from {min(lora):.0f} to {max(lora):.0f}.",
        "",
        "| method | trained | time / LoRA | peak / LoRA | time / PEFT | peak / PEFT |",
        "|---|---|---|---|---|---|",
        *(_line(row, rows[row]) for row in ordered if row != "lora"),
    ]
    return "\n".join(said) + "\n"


def _line(row: str, found: dict[str, Any]) -> str:
    fields = {k: v for k, v in ROWS[row][1].items() if k not in ("target_modules", "progressbar")}
    name = row + "".join(f", {k} {v}" for k, v in fields.items() if isinstance(v, int | str))
    cells = [f"{ratios(found)[c]:.2f}" if c in ratios(found) else "-" for c in COLUMNS]
    trained = f"{found['ours']['trained']:,}" if "ours" in found else "-"
    return f"| {' | '.join([name, trained, *cells])} |"


if __name__ == "__main__":
    main()
