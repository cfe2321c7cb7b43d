"""One program that runs a model, for bench_peers.py to time: started in that program's interpreter,
it knows nothing of this project but where it is the one to be timed.

    python bench_workers.py PROGRAM MODEL --threads N --context N --vocab-size N

It loads MODEL and says {"version": V, "peak_bytes": B}; then it answers each line that it reads
with {"seconds": S, "peak_bytes": B}, until its input ends, and sleeps between:

    {"do": "prefill", "tokens": N, "depth": D}   the first token after N fresh ones, D in the cache
    {"do": "decode", "tokens": N, "depth": D}    N tokens one by one, D in the cache

Tokens are random ids, and the next is always the most probable: each token's logits are read and
the greatest is looked for, as a program that generates does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BATCH = 512  # llama.cpp's n_ubatch: tokens of a prompt that it computes together


class Program(Protocol):
    """A loaded model: `stream` gives the ids that follow, one by one, and computes only what the
    program's cache does not hold of `ids` already. `version` also says how it was built."""

    version: str

    def stream(self, ids: list[int]) -> Iterator[int]: ...


class Ours:
    def __init__(self, options: argparse.Namespace) -> None:
        import qwen3_tg

        # tinygrad's lowering has one thread, and none to choose
        threads = None if options.kernels == "generic" else options.threads
        self._llm = qwen3_tg.load(
            options.model,
            device="CPU",
            context=options.context,
            kernels=options.kernels,
            threads=threads,
            prefix_cache_bytes=0,  # a prompt that comes again is to be read again
        )
        kernels = self._llm.policy.kernels
        self.version = f"qwen3_tg {qwen3_tg.__version__}, {kernels} kernels"

    def stream(self, ids: list[int]) -> Iterator[int]:
        return self._llm.generate_ids(ids, stop_ids=())


class LlamaCpp:
    """By its C functions, with the defaults of llama.cpp: a cache in float16, flash attention where
    it thinks best. llama_cpp.Llama has other defaults, and a sampler."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(options.model.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {Path(options.model).name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = options.context
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = options.threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {options.context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._cached: list[int] = []
        info = llama_cpp.llama_print_system_info().decode()
        used = ", ".join(re.findall(r"(\w+) = 1", info))
        self.version = f"llama-cpp-python {llama_cpp.__version__}, {self._compiler()}, {used}"
        self._vocab_size = options.vocab_size

    def stream(self, ids: list[int]) -> Iterator[int]:
        start = common_prefix(self._cached, ids)
        self._lib.llama_memory_seq_rm(self._memory, 0, start, -1)
        self._cached = ids[:start]
        new = ids[start:]
        while True:
            for first in range(0, len(new), BATCH):
                self._decode(new[first : first + BATCH])
            logits = self._lib.llama_get_logits_ith(self._context, -1)
            new = [int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())]
            yield new[0]

    def _decode(self, ids: list[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)  # the batch points into it
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        self._cached += ids

    def _compiler(self) -> str:
        """What the library says that it was compiled by."""
        library = next((Path(self._lib.__file__).parent / "lib").glob("libggml-cpu.*"), None)
        found = re.search(
            rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes() if library else b""
        )
        return found[0].decode() if found else "compiler unknown"


class Transformers:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self._torch: Any = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
        self._cached: list[int] = []
        self._cache: Any = None
        built = torch.backends.cpu.get_cpu_capability()
        self.version = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {built}"
        )

    def stream(self, ids: list[int]) -> Iterator[int]:
        start = common_prefix(self._cached, ids)
        if self._cache is not None and start < len(self._cached):
            self._cache.crop(start - len(self._cached))  # negative: so many fewer
        self._cached = ids[:start]
        new = ids[start:]
        while True:
            with self._torch.inference_mode():
                out = self._model(
                    self._torch.tensor([new]),
                    past_key_values=self._cache if self._cached else None,
                    use_cache=True,
                    logits_to_keep=1,
                )
            self._cache = out.past_key_values
            self._cached = self._cached + new
            new = [int(out.logits[0, -1].argmax())]
            yield new[0]


class Tinygrad:
    """tinygrad's own program for language models, by the class that its command line uses."""

    def __init__(self, options: argparse.Namespace) -> None:
        from importlib.metadata import version

        from tinygrad.llm.model import Transformer

        self._model, _ = Transformer.from_gguf(Path(options.model), options.context)
        self.version = f"tinygrad {version('tinygrad')}, the compiler of ours"

    def stream(self, ids: list[int]) -> Iterator[int]:
        # it appends to the list that it is given
        found: Iterator[int] = self._model.generate(list(ids))
        return found


PROGRAMS = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "tinygrad": Tinygrad,
}


def common_prefix(cached: list[int], ids: list[int]) -> int:
    """How many ids need not be computed again; the last one is, in any case."""
    most = min(len(cached), len(ids) - 1)
    return next((n for n in range(most) if cached[n] != ids[n]), most)


def measure(
    program: Program, fresh: np.random.Generator, vocab_size: int, do: str, tokens: int, depth: int
) -> float:
    """Seconds for one line of input; filling the cache up to `depth` is not in them."""
    # the same ids whenever a depth is asked for, so that a cache that holds them is not filled anew
    before = draw(np.random.default_rng(depth), depth, vocab_size)
    if do == "prefill":
        if before:
            next(program.stream(before))
        ids = before + draw(fresh, tokens, vocab_size)
        began = time.perf_counter()
        next(program.stream(ids))
        return time.perf_counter() - began
    stream = program.stream(before or [0])
    for _ in range(2):  # the rest of the prompt, and the first single token
        next(stream)
    began = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    return time.perf_counter() - began


def draw(random: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    found: list[int] = random.integers(0, vocab_size, count).tolist()
    return found


def peak_bytes() -> int:
    """The most memory that this process ever had, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--dtype", help="that transformers computes in")
    parser.add_argument("--kernels", help="of ours")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a program prints is no answer
    program = PROGRAMS[options.program](options)

    def answer(**values: object) -> None:
        print(json.dumps(values | {"peak_bytes": peak_bytes()}), file=answers, flush=True)

    answer(version=program.version)
    fresh = np.random.default_rng()
    for line in sys.stdin:
        answer(seconds=measure(program, fresh, options.vocab_size, **json.loads(line)))


if __name__ == "__main__":
    main()
