"""What it costs to look at several positions at once, by the time of a single step.

    python tools/bench_guesses.py MODEL [MODEL ...] [--kernels generic] [--depth 512] [--rounds 9]

Steps of 1, 2, 4 and 8 positions take turns, so that what else the machine does meets all of them.
Prints the median of each, how many single steps that is (so many tokens a step has to give for
guesses to pay), and how far the logits are from those of single steps, by their spread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

import qwen3_tg
from qwen3_tg.pace import LENGTHS

WIDTHS = (1, *(length + 1 for length in LENGTHS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--kernels")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache before (512)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for model in options.models:
        print(measured(model, options.kernels, options.depth, options.rounds), flush=True)


def measured(model: str, kernels: str | None, depth: int, rounds: int) -> str:
    """One line of the table."""
    llm = qwen3_tg.load(model, context=depth + WIDTHS[-1] + 1, kernels=kernels)
    random = np.random.default_rng(0)
    ids = random.integers(0, min(1000, llm.config.vocab_size), depth + WIDTHS[-1]).tolist()
    engine = llm._engine
    seconds: dict[int, list[float]] = {width: [] for width in WIDTHS}
    off = 0.0
    for n in range(rounds + 1):  # the first is not counted
        for width in WIDTHS:
            engine.next_logits(ids[:depth])
            began = time.perf_counter()
            rows = [engine.next_logits(ids[: depth + 1], ids[depth + 1 : depth + width])]
            if n:
                seconds[width].append(time.perf_counter() - began)
            rows += [engine.next_logits(ids[: depth + 1 + i]) for i in range(1, width)]
            if width == 1:
                alone = [engine.next_logits(ids[: depth + i]) for i in range(1, WIDTHS[-1] + 1)]
            if n:  # before, the last of the tokens in the cache was computed in another step
                off = max(off, float(np.abs(np.subtract(rows, alone[:width])).max()))
    medians = {width: statistics.median(found) for width, found in seconds.items()}
    times = ", ".join(
        f"{width}: {median * 1e3:.1f} ms ({median / medians[1]:.2f})"
        for width, median in medians.items()
    )
    return f"{model}: {times}; logits off by {off / np.std(alone):.1e}"


if __name__ == "__main__":
    main()
