"""Kernels as tinygrad sees them: lists of steps for the C program, and the buffers they work on.

A kernel is a finished PROGRAM whose machine code is a few instructions: it collects its arguments
and calls the C program, whose address it reads from the pool. What each step's integers mean is
said at its function in steps.c.

Touches tinygrad's internals: `Ops.PROGRAM`, `ProgramInfo`, `Estimates` and `Tensor.custom_kernel`.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from tinygrad import Tensor, dtypes

from qwen3_tg_cpu.library import Library, compiled, library

# In the order of the enum in types.c.
TYPES = (
    *("float32", "float16", "bfloat16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K"),
    *("Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "AWQ", "GPTQ", "FP8", "MLX"),
)
# The arrays of a format, in the order that types.c takes them.
_ARRAYS = {
    "AWQ": ("qweight", "qzeros", "scales"),
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
    "FP8": ("weight", "weight_scale_inv"),
    "MLX": ("weight", "scales", "biases"),
}
_CACHE_TYPES = {dtypes.float32: 0, dtypes.float16: 1, dtypes.bfloat16: 2}
_SCALE_TYPES = {dtypes.float32: 0, dtypes.float16: 1, dtypes.uint16: 2}
_EMBED, _NORM, _LINEAR, _CACHE, _ATTEND = range(5)
_GATED, _LAST_POSITION, _EXACT = 1, 2, 4
_STEP_INTS = 40
_NONE = -1
_MOST_ARGUMENTS = 63  # of a program on tinygrad's CPU device
_MOST_PARTS = 64  # as in attention.c


class Matrix(Protocol):
    """A stored weight: `format` of TYPES, `shape` (outputs, inputs) or (width,), `arrays` on the
    device as the file holds them, `params` as there: bits, group_size, block_size, zero_offset;
    `nbytes` on the device."""

    format: str
    shape: tuple[int, ...]
    arrays: Mapping[str, Tensor]
    params: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class AttentionWeights:
    """Those of one layer; `norm` stands in front, `eps` is that of all its norms, whose weights are
    those of Kernels.vector()."""

    norm: Tensor
    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    q_norm: Tensor
    k_norm: Tensor
    o_proj: Matrix
    heads: int
    kv_heads: int
    eps: float


@dataclass(frozen=True)
class MLPWeights:
    """Those of one layer; `norm` stands in front: Kernels.vector()."""

    norm: Tensor
    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix
    eps: float


def load(threads: int | None = None, exact: bool = False) -> Kernels | None:
    """The kernels, on so many threads (None: all physical cores). None, with one warning that says
    why, where the program cannot be compiled or started here: the model then runs without.

    `exact`: activations stay float32 in every product. Otherwise those of one position are rounded
    to 16 bits where weights are integers."""
    try:
        found = library()
    except Exception as e:  # compilers and loaders fail in every way there is
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        warnings.warn(f"computing without the fast CPU kernels: {reason}", stacklevel=2)
        return None
    if threads is not None:
        found.use(threads)
    return Kernels(found, exact)


class Kernels:
    """Parts of a decoder, on float32 tensors of one sequence: x is (1, S, D). `at` is an int32
    tensor of two: the position of the first new token, and how many of the S are there; rows beyond
    them are left as they are."""

    def __init__(self, found: Library, exact: bool):
        self._library, self._flags = found, _EXACT if exact else 0
        self.pool = Tensor.from_blob(found.pool, (1,), dtype=dtypes.uint8, device="CPU")
        self.lists: list[np.ndarray] = []  # lists of steps, which graphs read where they lie
        self._scratch: dict[str, Tensor] = {}

    @property
    def threads(self) -> int:
        """Threads that compute, with the calling one."""
        return self._library.threads

    def vector(self, weight: Matrix) -> Tensor:
        """A norm's weight as float32. Not to be called while a graph is captured."""
        host = weight.arrays["data"].numpy()
        if host.dtype == np.uint16:  # bfloat16
            host = (host.astype(np.uint32) << 16).view(np.float32)
        return Tensor(host.astype(np.float32), device="CPU").realize()

    def embed(self, ids: Tensor, weight: Matrix, at: Tensor) -> Tensor:
        """Rows of the embedding. ids: (1, S) int32 -> (1, S, D)"""
        steps = _Steps(self, at)
        out = _new(1, int(ids.shape[1]), weight.shape[1])
        steps.add(_EMBED, steps.arg(ids), steps.arg(out), *steps.matrix(weight))
        return steps.run("embed", out)

    def layer(
        self,
        x: Tensor,
        at: Tensor,
        attention: AttentionWeights,
        mlp: MLPWeights | None,
        rope: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """x + attention, and where there is an `mlp`, that + mlp. The new keys and values are written
        to the caches, (1, capacity, K, Hd) each. `rope` is (positions, Hd): cosines, then sines."""
        steps = _Steps(self, at)
        out = _new(*x.shape)
        if mlp is None:
            self._attention(steps, x, out, attention, rope, k_cache, v_cache)
            return steps.run("attention", out)
        middle = self._room("middle", x.numel())
        self._attention(steps, x, middle, attention, rope, k_cache, v_cache)
        inner = self._room("inner", int(x.shape[1]) * mlp.gate_proj.shape[0])
        gated = [mlp.gate_proj, mlp.up_proj]
        self._normed(steps, middle, x.shape, mlp.norm, mlp.eps, gated, inner, _GATED)
        self._linear(steps, inner, [mlp.down_proj], out, added=middle)
        return steps.run("layer", out)

    def head(
        self, x: Tensor, at: Tensor, norm: Tensor, weight: Matrix, eps: float, every: bool
    ) -> Tensor:
        """Logits of the last position that is there, (V,), or of every one, (S, V)."""
        steps = _Steps(self, at)
        S, V = int(x.shape[1]), weight.shape[0]
        if every:
            out = _new(S, V)
            self._normed(steps, x, x.shape, norm, eps, [weight], out)
        else:
            out = _new(V)
            self._linear(steps, x, [weight], out, _LAST_POSITION, norm=norm, eps=eps)
        return steps.run("head", out)

    def _attention(
        self,
        steps: _Steps,
        x: Tensor,
        out: Tensor,
        weights: AttentionWeights,
        rope: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        S, H, K = int(x.shape[1]), weights.heads, weights.kv_heads
        Hd = weights.q_proj.shape[0] // H
        qkv = self._room("qkv", S * (H + 2 * K) * Hd)
        mixed = self._room("mixed", S * H * Hd)
        parts = self._room("parts", _MOST_PARTS * H * (Hd + 2))
        projections = [weights.q_proj, weights.k_proj, weights.v_proj]
        self._normed(steps, x, x.shape, weights.norm, weights.eps, projections, qkv)
        heads = [H, K, Hd, _CACHE_TYPES[k_cache.dtype]]
        heads += [steps.arg(tensor) for tensor in (qkv, k_cache, v_cache, mixed, parts)]
        q_norm, k_norm = (steps.arg(weight) for weight in (weights.q_norm, weights.k_norm))
        steps.add(_CACHE, *heads, q_norm, k_norm, steps.arg(rope), _bits(weights.eps))
        steps.add(_ATTEND, *heads)
        self._linear(steps, mixed, [weights.o_proj], out, added=x)

    def _normed(
        self,
        steps: _Steps,
        x: Tensor,
        shape: Sequence[Any],
        norm: Tensor,
        eps: float,
        matrices: Sequence[Matrix],
        out: Tensor,
        flags: int = 0,
    ) -> None:
        """Products of RMSNorm(x): for one position every thread norms for itself."""
        if shape[1] == 1:
            self._linear(steps, x, matrices, out, flags, norm=norm, eps=eps)
            return
        normed = self._room("normed", x.numel())
        arguments = [steps.arg(tensor) for tensor in (x, norm, normed)]
        steps.add(_NORM, *arguments, shape[2], _bits(eps))
        self._linear(steps, normed, matrices, out, flags)

    def _linear(
        self,
        steps: _Steps,
        x: Tensor,
        matrices: Sequence[Matrix],
        out: Tensor,
        flags: int = 0,
        added: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        widths = [matrix.shape[0] for matrix in matrices]
        steps.add(
            _LINEAR,
            len(matrices),
            flags | self._flags,
            steps.arg(x),
            _NONE if norm is None else steps.arg(norm),
            steps.arg(out),
            widths[0] if flags & _GATED else sum(widths),
            _NONE if added is None else steps.arg(added),
            _bits(eps),
            *(number for matrix in matrices for number in steps.matrix(matrix)),
        )

    def _room(self, name: str, floats: int) -> Tensor:
        """Scratch that lives within a kernel: all kernels share it, as they run one by one."""
        if name not in self._scratch or self._scratch[name].numel() < floats:
            self._scratch[name] = _new(floats).realize()
        return self._scratch[name]

class _Steps:
    """A list of steps, and the buffers that they name by number. The first buffer is the pool, the
    second the list, the third `at`."""

    def __init__(self, kernels: Kernels, at: Tensor):
        self._tensors: list[Tensor | None] = [kernels.pool, None, at]
        self._lists = kernels.lists
        self._steps: list[list[int]] = []
        self._nbytes = 0

    def arg(self, tensor: Tensor) -> int:
        """The number of a buffer among the arguments."""
        for n, known in enumerate(self._tensors):
            if known is tensor:
                return n
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def matrix(self, matrix: Matrix) -> list[int]:
        """What steps.c's matrix() reads. Its arrays stand side by side among the arguments."""
        names = _ARRAYS.get(matrix.format, matrix.arrays)
        arrays = [matrix.arrays[name] for name in names if name in matrix.arrays]
        first, scales, params = len(self._tensors), arrays[1:3][-1:], matrix.params
        self._tensors += arrays
        self._nbytes += matrix.nbytes
        row_bytes = int(arrays[0].nbytes()) // matrix.shape[0]
        return [
            TYPES.index(matrix.format),
            first,
            *matrix.shape,
            row_bytes,
            params.get("bits", 0),
            params.get("group_size", params.get("block_size", 0)),
            params.get("zero_offset", 0),
            _SCALE_TYPES[scales[0].dtype] if scales else 0,
            len(arrays),
        ]

    def add(self, step: int, *ints: int) -> None:
        assert len(ints) < _STEP_INTS
        self._steps.append([step, *ints, *[0] * (_STEP_INTS - 1 - len(ints))])

    def run(self, name: str, out: Tensor) -> Tensor:
        """The tensor `out` once all steps are done."""
        list_ = [len(self._steps), *(number for step in self._steps for number in step)]
        host = np.array(list_, dtype=np.int32)
        self._lists.append(host)
        # where it lies, as a copy would become a part of the graph
        where = host.ctypes.data
        self._tensors[1] = Tensor.from_blob(where, host.shape, dtype=dtypes.int32, device="CPU")
        tensors = [tensor for tensor in self._tensors if tensor is not None]
        written = self.arg(out)
        kernel = _program(name, len(tensors), written, self._nbytes)
        return tensors[0].custom_kernel(*tensors[1:], fxn=lambda *_: kernel)[written]


@cache
def _program(name: str, arguments: int, written: int, nbytes: int) -> Any:
    """A finished tinygrad program that calls the C program with `arguments` buffers, of which one
    is said to be written: scratch and caches are this package's own business."""
    from tinygrad.device import Device
    from tinygrad.renderer import Estimates
    from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

    assert arguments <= _MOST_ARGUMENTS
    names = [f"a{n}" for n in range(arguments)]
    text = (
        "typedef unsigned long long u64;\n"
        f"void qwen3_tg_cpu_{arguments}({', '.join(f'u64 {n}' for n in names)}) {{\n"
        f"    const u64 args[] = {{{', '.join(names)}}};\n"
        "    (*(void (**)(u64, const u64 *))a0)(a0, args);\n"
        "}\n"
    )
    info = ProgramInfo(
        name=f"qwen3_tg_cpu_{name}",
        globals=tuple(range(arguments)),
        outs=(written,),
        ins=tuple(n for n in range(arguments) if n != written),
        target=Device["CPU"].renderer.target,
    )
    sink = UOp(Ops.SINK, arg=KernelInfo(name=info.name, estimates=Estimates(mem=nbytes, lds=nbytes)))
    parts = (sink, UOp(Ops.LINEAR), UOp(Ops.SOURCE, arg=text), UOp(Ops.BINARY, arg=compiled(text)))
    return UOp(Ops.PROGRAM, src=parts, arg=info)


def _new(*shape: Any) -> Tensor:
    return Tensor.empty(*shape, dtype=dtypes.float32, device="CPU")


def _bits(value: float) -> int:
    """A float32 as an int32 of the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
