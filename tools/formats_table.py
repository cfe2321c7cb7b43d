"""Write the README's table of formats from tests that ran.

    python tools/formats_table.py            # runs the tests of formats (minutes), then writes
    python tools/formats_table.py --report FILE   # from a report that `--formats-report` wrote

A row is a format with the largest error of its logits, in the engine and in the numpy reference,
against the reference on a float32 checkpoint of the same values (tests/qwen3_tg/test_formats.py).
Files with many types at once are tested, but have no row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- formats: start -->", "<!-- formats: end -->"
ENGINES = ("qwen3_tg generic", "qwen3_tg exact", "qwen3_tg fast", "qwen3_tg_numpy")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="a report that is there already")
    report: Path | None = parser.parse_args().report
    with tempfile.TemporaryDirectory() as folder:
        file = report or run_tests(Path(folder) / "report.json")
        rows = json.loads(file.read_text(encoding="utf-8"))
    commit = run("git", "rev-parse", "--short", "HEAD")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    today = datetime.date.today().isoformat()
    block = f"{START}\n{table(rows, today, commit)}{END}"
    readme.write_text(before + block + after, encoding="utf-8")


def run_tests(report: Path) -> Path:
    tests = ["tests/qwen3_tg/test_formats.py", "-q", "--formats-report", str(report)]
    subprocess.run([sys.executable, "-m", "pytest", "-n", "auto", *tests], cwd=ROOT, check=True)
    return report


def run(*command: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def table(rows: Iterable[Row], date: str, commit: str) -> str:
    """Markdown: a line on how it was measured, and a row a format."""
    rows = [row for row in rows if row["variant"] != "together"]  # errors of several in one
    device = next(row["device"] for row in rows if row["engine"] == ENGINES[0])
    lines = [
        f"Measured on {date} at commit {commit} by `python tools/formats_table.py`, on {device}:",
        "the largest difference of any logit, where logits have a spread of one. Fast kernels keep",
        "keys and values in float16, and were compared on dense models.",
        "",
        "| format | dense | mixture | tinygrad | CPU, exact | CPU, fast | numpy |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted({row["format"] for row in rows}, key=order):
        own = [row for row in rows if row["format"] == name]
        kinds = [
            "yes" if any(row["model"] == kind for row in own) else "" for kind in ("dense", "moe")
        ]
        errors = [error([row for row in own if row["engine"] == engine]) for engine in ENGINES]
        lines.append(f"| {name} | {' | '.join(kinds)} | {' | '.join(errors)} |")
    return "\n".join(lines) + "\n"


def error(rows: list[Row]) -> str:
    if not rows:
        return "refused"
    worst = max(row["max_abs_error"] for row in rows)
    return f"{worst:.1e}" if worst else "0"


def order(name: str) -> tuple[int, str]:
    """safetensors first, then GGUF, then the others."""
    kinds = ("safetensors", "GGUF")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name


if __name__ == "__main__":
    main()
