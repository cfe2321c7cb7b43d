"""One program that runs a model, for bench_peers.py to time: started in that program's interpreter,
it knows nothing of this project but where it is the one to be timed.

    python bench_workers.py PROGRAM MODEL --threads N --context N

It loads MODEL and says so in a line of JSON; then it reads a line {"tokens": N, "depth": D} and
answers {"seconds": S, "peak_bytes": B}, until its input ends. With depth null the time is that of a
prompt of N tokens; else of N tokens, one by one, where D are in the cache already. Each token's
logits are read and the greatest is looked for, as a program that generates does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Program(Protocol):
    """`version` names the program; `logits` takes all ids so far and gives the next token."""

    version: str

    def next(self, ids: list[int]) -> int: ...


class Ours:
    def __init__(self, path: str, threads: int, context: int) -> None:
        import qwen3_tg

        kernels = os.environ.get("BENCH_KERNELS")
        self._llm = qwen3_tg.load(
            path, "CPU", context=context, kernels=kernels, threads=None if kernels else threads
        )
        self.version = f"qwen3_tg {qwen3_tg.__version__}"

    def next(self, ids: list[int]) -> int:
        return next(self._llm.generate_ids(ids, max_new_tokens=1, stop_ids=()))


class LlamaCpp:
    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp

        self._llm: Any = llama_cpp.Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._logits = llama_cpp.llama_get_logits_ith
        self._known: list[int] = []
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def next(self, ids: list[int]) -> int:
        start = common_prefix(self._known, ids)
        self._llm.n_tokens = start
        self._llm.eval(ids[start:])
        self._known = ids
        pointer = self._logits(self._llm._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(pointer, shape=(self._llm.n_vocab(),)).argmax())


class Transformers:
    def __init__(self, path: str, threads: int, context: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        self._known: list[int] = []
        self._cache: Any = None
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def next(self, ids: list[int]) -> int:
        start = common_prefix(self._known, ids)
        if start == 0:
            self._cache = None
        elif start < len(self._known):
            self._cache.crop(start)
        with self._torch.inference_mode():
            out = self._model(
                self._torch.tensor([ids[start:]]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._known, self._cache = ids, out.past_key_values
        return int(out.logits[0, -1].argmax())


class Tinygrad:
    """tinygrad's own program for language models, by the class that its command line uses."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        from importlib.metadata import version

        from tinygrad.llm.model import Transformer

        self._model, _ = Transformer.from_gguf(Path(path), context)
        self.version = f"tinygrad {version('tinygrad')}"

    def next(self, ids: list[int]) -> int:
        return int(next(self._model.generate(list(ids))))


PROGRAMS: dict[str, Callable[[str, int, int], Program]] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "tinygrad": Tinygrad,
}


def common_prefix(known: list[int], ids: list[int]) -> int:
    """How many ids need not be computed again; the last one is, in any case."""
    most = min(len(known), len(ids) - 1)
    return next((n for n in range(most) if known[n] != ids[n]), most)


def measure(program: Program, random: np.random.Generator, tokens: int, depth: int | None) -> float:
    """Seconds for a fresh prompt of `tokens`, or for `tokens` one by one at a depth."""
    if depth is None:
        ids = draw(random, tokens)
        began = time.perf_counter()
        program.next(ids)
        return time.perf_counter() - began
    # the same ids at each depth, so that a program that keeps its cache fills it once
    ids = draw(np.random.default_rng(depth), max(depth, 1))
    ids.append(program.next(ids))
    ids.append(program.next(ids))  # what the first single token costs is not of interest
    began = time.perf_counter()
    for _ in range(tokens):
        ids = [*ids, program.next(ids)]
    return time.perf_counter() - began


def draw(random: np.random.Generator, count: int) -> list[int]:
    return [int(id) for id in random.integers(0, 150_000, count)]


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a program prints is no answer
    began = time.perf_counter()
    program = PROGRAMS[options.program](options.model, options.threads, options.context)

    def answer(**values: object) -> None:
        print(json.dumps(values | {"peak_bytes": peak_bytes()}), file=answers, flush=True)

    answer(version=program.version, seconds=time.perf_counter() - began)
    random = np.random.default_rng()
    for line in sys.stdin:
        answer(seconds=measure(program, random, **json.loads(line)))


if __name__ == "__main__":
    main()
