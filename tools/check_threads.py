"""Run the CPU kernels under ThreadSanitizer.

    python tools/check_threads.py [--threads 4]

Compiles the C program of backends/qwen3_tg_cpu with tools/check_threads.c, which runs its steps
from two callers on several threads. Exits 0 if no race was seen, 1 with the report if one was, and
2 where there is no compiler with that sanitizer. ziglang's takes two minutes the first time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

from qwen3_tg_cpu.library import source  # noqa: E402

# clang's own, and the one in PyPI's ziglang
COMPILERS = (["clang"], [sys.executable, "-m", "ziglang", "cc"], ["cc"])
FLAGS = ["-fsanitize=thread", "-O1", "-g", "-march=native", "-w", "-pthread"]


def build(text: str, folder: Path) -> Path | None:
    """The program, by the first compiler that can."""
    file, program = folder / "check_threads.c", folder / "check_threads"
    file.write_text(text, encoding="utf-8")
    for compiler in COMPILERS:
        try:
            done = subprocess.run(
                [*compiler, *FLAGS, str(file), "-o", str(program), "-lm"], capture_output=True
            )
        except OSError:
            continue
        if done.returncode == 0:
            return program
    return None


def check(text: str, threads: int) -> tuple[int, str]:
    """The exit code, and what is to be said."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(text, Path(folder))
        if program is None:
            return 2, "no compiler with ThreadSanitizer; get one with: pip install ziglang"
        done = subprocess.run([program, str(threads)], capture_output=True, text=True, timeout=1200)
    races = done.stderr.count("WARNING: ThreadSanitizer: data race")
    if done.returncode == 0 and races == 0:
        return 0, f"no race seen: {done.stdout.strip()}"
    return 1, f"{done.stderr}\n{races} races, code {done.returncode}"


def program_text() -> str:
    """All of the C."""
    return f"{source()}\n{(ROOT / 'tools' / 'check_threads.c').read_text(encoding='utf-8')}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=4)
    code, text = check(program_text(), parser.parse_args().threads)
    print(text, file=sys.stderr if code else sys.stdout)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
