"""Kernels with their source: for a device that is here, with times; for one that is not, without.

Touches tinygrad's internals: its lowering (`to_program`), programs, and `time_call`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor

from qwen3_tg.checkpoint import StoredWeight
from qwen3_tg.checkpoint.types import TABLE_BLOCKS, UNPACKED_AS
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy
from qwen3_tg.kernels.schedule import Call, ModelParts
from qwen3_tg.linear import Weight, to_device

_COLOURS = re.compile(r"\x1b\[\d+m")  # tinygrad writes names for a terminal
TIMES = 5  # a kernel is timed; the shortest counts


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step. `nbytes` are those it must move at least, counting every number once;
    `flop` its operations on numbers; `seconds` None where it was not run."""

    phase: str
    step: str
    name: str
    source: str
    nbytes: int
    flop: int
    seconds: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        return None if self.seconds is None else self.nbytes / self.seconds


def phases(policy: Policy) -> dict[str, int]:
    """Positions at once of what is captured: a chunk of a prompt, and one."""
    return {"prompt": policy.prefill_chunk, "decode": 1}


def lowered(
    config: ModelConfig,
    stored: Mapping[str, StoredWeight],
    layer: int,
    policy: Policy,
    renderer: Any = None,
    on_kernel: Callable[[int, int], None] | None = None,
) -> Iterator[Kernel]:
    """Each kernel of a layer, the embedding and the head. With a `renderer` (targets.py) they are
    rendered for it and not run. `on_kernel` is told how many of a phase are done, and of how many.
    """
    names = ModelParts.names(config, layer)
    if renderer is None:
        weights = {
            n: to_device(stored[n], policy.device, policy.native) for n in names if n in stored
        }
    else:
        weights = {n: _without_memory(stored[n], policy) for n in names if n in stored}
    parts = ModelParts(config, weights, layer, policy)
    for phase, S in phases(policy).items():
        calls = list(parts.calls(S))
        for number, call in enumerate(calls, start=1):
            kernel = _run(phase, call) if renderer is None else _render(phase, call, renderer)
            yield kernel
            if on_kernel:
                on_kernel(number, len(calls))


def _render(phase: str, call: Call, renderer: Any) -> Kernel:
    from tinygrad.codegen import to_program

    return _described(phase, call, to_program(call.call.src[0], renderer))


def _run(phase: str, call: Call) -> Kernel:
    from tinygrad.engine.realize import compile_linear, time_call
    from tinygrad.uop.ops import Ops, UOp

    (compiled,) = compile_linear(UOp(Ops.LINEAR, src=(call.call,))).src
    timer = time_call(compiled, dict(call.var_vals))
    seconds = min(next(timer) for _ in range(TIMES))
    return _described(phase, call, compiled.src[0], seconds)


def _described(phase: str, call: Call, program: Any, seconds: float | None = None) -> Kernel:
    from tinygrad.uop.ops import sym_infer

    estimates = program.src[0].arg.estimates
    flop, nbytes = (
        math.ceil(sym_infer(number, dict(call.var_vals)))
        for number in (estimates.ops, estimates.mem)
    )
    source = program.src[2].arg
    name = _COLOURS.sub("", program.arg.name)
    return Kernel(phase, call.step, name, source, nbytes, flop, seconds)


def _without_memory(stored: StoredWeight, policy: Policy) -> Weight:
    """As linear.to_device gives it, on tinygrad's device that computes nothing."""
    from tinygrad import dtypes

    if stored.format in TABLE_BLOCKS:
        stored = StoredWeight(UNPACKED_AS, stored.shape, {"data": _absent_half(stored.shape)})
    arrays = {}
    for name in stored.arrays:
        array = stored.arrays[name]
        dtype = getattr(dtypes, array.dtype.name)
        if dtype == dtypes.float16 and "float16" not in policy.native:
            dtype = dtypes.int16
        arrays[name] = Tensor.empty(*array.shape, dtype=dtype, device=policy.device).realize()
    return Weight(stored.format, stored.shape, arrays, stored.params)


def _absent_half(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.broadcast_to(np.zeros((), dtype=np.float16), shape)
