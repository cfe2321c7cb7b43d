"""From ids to the next id: prefill in chunks, decode one by one, and know when to stop.

The only owner of TinyJit, of positions and of what the cache holds. Two graphs are captured: one
computes a whole chunk of new positions, the other a single one. `start_pos` is symbolic in both, so
no length of text is compiled anew; only when the cache grows (see kv_cache.py) are they captured
again.

Touches tinygrad's internals: `TinyJit.cnt`. TinyJit runs a function twice before it captures, to
see what a changing first call would do; ours never changes, and each such run costs seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Integral

import numpy as np
from tinygrad import Tensor, TinyJit, UOp

from qwen3_tg.device import Policy
from qwen3_tg.errors import ContextError, DeviceError, UsageError, check_count
from qwen3_tg.kernel_cache import KernelCache
from qwen3_tg.kv_cache import KVCache
from qwen3_tg.linear import DTYPES
from qwen3_tg.model import Qwen3
from qwen3_tg.sampling import Sampling, sample

Graph = Callable[[Tensor, UOp, UOp | int], Tensor]
# tinygrad captures and schedules for a whole process: one thread computes at a time.
_ONE_AT_A_TIME = threading.RLock()


class Engine:
    """A model on a device with its cache. Asked for the logits after a sequence of ids, it computes
    only what the cache does not hold yet, so callers never speak of positions.

    `context` is the most positions it takes."""

    def __init__(self, model: Qwen3, policy: Policy, context: int, kernels: KernelCache):
        self.model, self.context = model, context
        self._device, self._chunk, self._kernels = policy.device, policy.prefill_chunk, kernels
        # The last chunk of a full context reaches past its end with padding.
        limit = context + policy.prefill_chunk
        self._cache = KVCache(model.config, limit, DTYPES[policy.kv_dtype], policy.device)
        self._cached_ids: list[int] = []  # the ids whose keys and values the cache holds
        self._graphs: dict[str, Graph] = {}

    @property
    def cache_capacity(self) -> int:
        """Positions that the cache has room for at present; it grows up to the context."""
        return self._cache.capacity

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits for the token after `ids`, which start at position 0: (V,) float32.

        Raises ContextError if they do not fit, UsageError for none or ids out of range."""
        with _ONE_AT_A_TIME:
            return self._next_logits(list(ids))

    def _next_logits(self, ids: list[int]) -> np.ndarray:
        self._check_length(ids)
        # 1. Keep what the cache holds of these ids; the last one is computed in any case.
        start = min(_common_prefix(self._cached_ids, ids), len(ids) - 1)
        self._check_ids(ids[start:])
        self._forget_from(start)
        self._reserve(len(ids))
        # 2. Compute the rest, a chunk at a time.
        while True:
            new = ids[start : start + self._chunk] if len(ids) - start > 1 else ids[start:]
            logits = self._run("decode" if len(new) == 1 else "prefill", new, start)
            self._cached_ids += new  # only once the step has succeeded
            start += len(new)
            if start == len(ids):
                return logits

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after every one of `ids`: (S, V) float32. Errors as for next_logits."""
        with _ONE_AT_A_TIME:
            return self._all_logits(list(ids))

    def _all_logits(self, ids: list[int]) -> np.ndarray:
        self._check_length(ids)
        self._check_ids(ids)
        self._forget_from(0)
        self._reserve(len(ids))
        rows = []
        for start in range(0, len(ids), self._chunk):
            new = ids[start : start + self._chunk]
            rows.append(self._run("all", new, start)[: len(new)])
            self._cached_ids += new
        return np.concatenate(rows)

    def _check_length(self, ids: list[int]) -> None:
        if not ids:
            raise UsageError("no tokens to continue: give at least one id")
        if len(ids) > self.context:
            raise ContextError(
                f"{len(ids)} tokens do not fit in the context of {self.context}; "
                "shorten the text or load with a larger context"
            )

    def _check_ids(self, ids: list[int]) -> None:
        size = self.model.config.vocab_size
        for id in ids:
            if not isinstance(id, Integral) or not 0 <= id < size:
                raise UsageError(f"token id {id!r} is not in the vocabulary of {size}")

    def _forget_from(self, start: int) -> None:
        """To call before rows from `start` on are overwritten: a step may break off halfway."""
        del self._cached_ids[start:]

    def _reserve(self, positions: int) -> None:
        positions += self._chunk - 1  # the last chunk is padded
        if positions > self._cache.capacity:
            self._graphs.clear()  # first, as they write to the old buffers
            self._cache.grow(positions)

    def _run(self, kind: str, new: list[int], start: int) -> np.ndarray:
        """One step of the graph `kind` on new ids at positions start, start + 1, ..."""
        size = 1 if kind == "decode" else self._chunk
        padded = np.array(new + [0] * (size - len(new)), dtype=np.int32).reshape(1, size)
        ids = Tensor(padded, device=self._device).realize()
        first_pos = UOp.variable("start_pos", 0, self._cache.capacity - size).bind(start)
        last_row = UOp.variable("last_row", 0, size - 1).bind(len(new) - 1) if size > 1 else 0
        known = kind in self._graphs
        if not known:
            self._graphs[kind] = _capture_at_once(self._graph(kind))
        logits: np.ndarray = self._graphs[kind](ids, first_pos, last_row).numpy()
        if not known:
            self._kernels.save()
        if not np.isfinite(logits).all():
            raise DeviceError(
                f"{self._device} gave logits that are not finite numbers: the weights are damaged, "
                "or numbers overflow there; try --dtype float32, or another --device"
            )
        return logits

    def _graph(self, kind: str) -> Graph:
        def graph(ids: Tensor, start_pos: UOp, last_row: UOp | int) -> Tensor:
            x = self.model.hidden(ids, self._cache, start_pos)  # (1, S, D)
            if kind == "all":
                return self.model.logits(x)[0].realize()  # (S, V)
            row = x[:, last_row : last_row + 1]  # the head is large: for the wanted row alone
            return self.model.logits(row).flatten().realize()  # (V,)

        return graph


class Generation(Iterator[int]):
    """The ids that follow `prompt`, one by one. Also says, while running and after: `stop_reason`
    (None until the end; then "stop", "length" or "context"), `stop_id`, counts, and seconds."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        max_new_tokens: int | None,
        sampling: Sampling,
        stop_ids: Collection[int],
    ):
        check_count("max_new_tokens", max_new_tokens, least=1)
        if len(prompt) >= engine.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context {engine.context}: "
                "no room for an answer; shorten the prompt or load with a larger context"
            )
        self._engine, self._sampling, self._stop_ids = engine, sampling, frozenset(stop_ids)
        self._ids = list(prompt)
        self.max_new_tokens = max_new_tokens
        self.prompt_tokens, self.new_tokens = len(prompt), 0
        self.first_token_s = self.later_tokens_s = 0.0
        self.stop_reason: str | None = None
        self.stop_id: int | None = None

    def __next__(self) -> int:
        if self.stop_reason is None:
            if self.max_new_tokens is not None and self.new_tokens >= self.max_new_tokens:
                self.stop_reason = "length"
            elif len(self._ids) >= self._engine.context:
                self.stop_reason = "context"
        if self.stop_reason is not None:
            raise StopIteration
        began = time.perf_counter()
        logits = self._engine.next_logits(self._ids)
        id = sample(logits, self._sampling, self.new_tokens)
        if self.new_tokens == 0:
            self.first_token_s = time.perf_counter() - began
        else:
            self.later_tokens_s += time.perf_counter() - began
        if id in self._stop_ids:
            self.stop_reason, self.stop_id = "stop", id
            raise StopIteration
        self._ids.append(id)
        self.new_tokens += 1
        return id

    def insert(self, ids: Sequence[int]) -> list[int]:
        """Continue as if these ids had been generated, as far as they fit; returns those."""
        fitting = list(ids)[: max(0, self._engine.context - len(self._ids))]
        self._ids += fitting
        self.new_tokens += len(fitting)
        return fitting


def _capture_at_once(graph: Graph) -> Graph:
    jit = TinyJit(graph)
    jit.cnt = 1
    return jit


def _common_prefix(a: list[int], b: list[int]) -> int:
    if a == b[: len(a)]:  # the usual case, at the speed of C
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
