"""What it costs to go on with a text after another one, and in a later process.

    python tools/bench_kept.py MODEL [--tokens 1000] [--new 20] [--rounds 5]

Prints the seconds to read a text of so many tokens, to read a few more right after it, the same
after another text of that length (whose keys and values go to main memory, and the text's come
back), and to write what is computed of it to a file and take it from there; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import qwen3_tg


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    length = options.tokens + (2 * options.rounds + 2) * options.new
    llm = qwen3_tg.load(options.model, context=length)
    random = np.random.default_rng(0)
    one, other = random.integers(0, min(1000, llm.config.vocab_size), (2, length)).tolist()
    llm.next_logits(other[:40])  # makes the kernels
    llm.next_logits(other[:41])
    found: dict[str, list[float]] = {}

    def timed(what: str, run: Callable[..., object], *given: object) -> None:
        began = time.perf_counter()
        run(*given)
        found.setdefault(what, []).append(time.perf_counter() - began)

    n = options.tokens
    timed("all of it", llm.next_logits, one[:n])
    llm.next_logits(other[:n])
    for _ in range(options.rounds):
        n += options.new
        timed("new tokens, after another text", llm.next_logits, one[:n])
        n += options.new
        timed("new tokens, at once", llm.next_logits, one[:n])
        llm.next_logits(other[:n])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kept"
        for _ in range(options.rounds):
            timed("writing the file", llm.save_computed, file, one[: options.tokens])
            timed("taking it from there", llm.load_computed, file)
        size = file.stat().st_size
    print(f"{options.model}: {options.tokens} tokens, then {options.new} new; file {size:,} bytes")
    for what, seconds in found.items():
        print(f"  {what:<32} {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
