"""A whole step of the model as one kernel: a list of steps for the C program.

    steps = kernels.steps(ids, at)
    x = steps.embed(weight)
    x = steps.attention(x, ...); x = steps.mlp(x, ...) or steps.experts(x, ...)   # each layer
    logits = steps.head(x, ...)

To tinygrad the kernel is a finished PROGRAM with few buffers. Its machine code is some instructions
that collect the arguments and call the C program. Addresses of weights, caches and scratch stand in
the list: whoever makes a kernel keeps what it gave to it as long as it may run.

Touches tinygrad's internals: `Ops.PROGRAM`, `ProgramInfo`, `Estimates`, `Tensor.custom_kernel` and
a tensor's `Buffer`.
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
_MOST_ARRAYS = 4
_SCALES = {"AWQ": 2, "GPTQ": 2, "FP8": 1, "MLX": 1}  # which of them the scales are
_FLOAT_TYPES = {dtypes.float32: 0, dtypes.float16: 1, dtypes.bfloat16: 2, dtypes.uint16: 2}
_CACHE_TYPES = _FLOAT_TYPES | {dtypes.int8: len(TYPES)}
# In the order of the enums in steps.c.
_EMBED, _NORM, _LINEAR, _CACHE, _ATTEND, _ROUTE, _GROUP, _EXPERTS, _COMBINE = range(9)
# The functions there that do them.
_FUNCTIONS = "embed norm linear cache attend route group_pairs experts combine".split()
_GATED, _LAST_POSITION, _EXACT, _ALIKE = 1, 2, 4, 8
_STEP_NUMBERS = 52
_MOST_PARTS = 64  # as in attention.c
MOST_ALIKE = 64
"""The most positions that a kernel computes as each would be computed alone, as in steps.c."""


class Matrix(Protocol):
    """A stored weight: `format` of TYPES; `shape` (outputs, inputs), with (experts,) in front, or
    (width,); `arrays` on the device as the file holds them; `params` as there: bits, group_size,
    block_size, zero_offset; `nbytes` on the device."""

    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def arrays(self) -> Mapping[str, Tensor]: ...
    @property
    def params(self) -> Mapping[str, int]: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class AttentionWeights:
    """Those of one layer; `norm` stands in front. Norms are Kernels.vector()s."""

    norm: Tensor
    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    q_norm: Tensor
    k_norm: Tensor
    o_proj: Matrix
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class MLPWeights:
    """Those of one layer; `norm` stands in front. With a `router` they are those of all experts, of
    which `k` are chosen, and `sum_to_one` says whether their probabilities are made to."""

    norm: Tensor
    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix
    router: Matrix | None = None
    k: int = 0
    sum_to_one: bool = False


def load(threads: int | None = None, exact: bool = False) -> Kernels | None:
    """The kernels, on so many threads (None: all physical cores). None, with one warning that says
    why, where the program cannot be compiled or started here: the model then runs without.

    `exact`: activations stay float32 in every product. Otherwise those of one position are rounded
    to 16 bits where weights are integers."""
    found = _library_or_reason()
    if isinstance(found, str):
        return None
    if threads is not None:
        found.use(threads)
    return Kernels(found, exact)


@cache
def _library_or_reason() -> Library | str:
    try:
        return library()
    except Exception as e:  # compilers and loaders fail in every way there is
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        warnings.warn(f"computing without the fast CPU kernels: {reason}", stacklevel=4)
        return reason


class Kernels:
    """What kernels of one model share: scratch, and arrays that they read where they lie."""

    def __init__(self, found: Library, exact: bool):
        self._library, self.exact = found, exact
        self.pool = Tensor.from_blob(found.pool, (1,), dtype=dtypes.uint8, device="CPU")
        self._kept: list[np.ndarray] = []
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def threads(self) -> int:
        """Threads that compute, with the calling one."""
        return self._library.threads

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch that kernels made so far share."""
        return sum(array.nbytes for array in self._scratch.values())

    def vector(self, weight: Matrix) -> Tensor:
        """A norm's weight as float32. Not to be called while a graph is captured."""
        host = weight.arrays["data"].numpy()
        if host.dtype == np.uint16:  # bfloat16
            host = (host.astype(np.uint32) << 16).view(np.float32)
        return self.keep(host.astype(np.float32))

    def keep(self, host: np.ndarray) -> Tensor:
        """A tensor over an array, which stays: to copy it would be a step of the graph, and takes
        milliseconds outside of one."""
        self._kept.append(host)
        dtype = getattr(dtypes, host.dtype.name)
        return Tensor.from_blob(host.ctypes.data, host.shape, dtype=dtype, device="CPU")

    def room(self, name: str, nbytes: int) -> int:
        """The address of scratch for the time of a kernel: all share it, as they run one by one."""
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch[name] = np.empty(nbytes, dtype=np.uint8)
            self._kept.append(self._scratch[name])  # older kernels use what was there before
        return int(self._scratch[name].ctypes.data)

    def scratch(self, name: str) -> np.ndarray:
        """What `room` gave the address of, as float32."""
        return self._scratch[name].view(np.float32)

    def steps(
        self, ids: Tensor, at: Tensor, eps: float, alike: bool = False, batch: bool = False
    ) -> Steps:
        """An empty list. ids: (1, S) int32; at: (2,) int32, the position of the first new token,
        and how many of the S are there; `eps` is that of all norms.

        `alike`: of each position, of at most MOST_ALIKE, to the last bit what a kernel for it alone
        gives. Without it several positions are computed in another order, which is faster for many,
        and their activations are never rounded. `batch`: the S are of as many sequences, each with
        caches of its own; `at` is (2 + 2 S,) then: 0, how many are there, and of each of these its
        position and its slot, which is the number of its caches."""
        return Steps(self, ids, at, eps, alike, batch)


class Steps:
    """One kernel in the making, for a sequence of S new positions. x, what the layers hand on, is
    an address of (S, D) float32."""

    def __init__(
        self, kernels: Kernels, ids: Tensor, at: Tensor, eps: float, alike: bool, batch: bool
    ):
        self._kernels, self._ids, self._at, self._eps = kernels, ids, at, _bits(eps)
        self._S = int(ids.shape[1])
        assert not alike or self._S <= MOST_ALIKE
        self._alike, self._batch = alike or self._S == 1, batch
        self._flags = (_EXACT if kernels.exact else 0) | (_ALIKE if self._alike else 0)
        self._numbers: list[int] = []
        self._nbytes = self._told_nbytes = 0
        self.described: list[tuple[str, int]] = []
        """Of each step so far, the C function that does it, and the bytes of weights it reads for
        one position."""

    def embed(self, weight: Matrix) -> int:
        """Rows of the embedding."""
        out = self._room("x", weight.shape[1])
        self._add(_EMBED, self._address(self._ids), out, *self._matrix(weight))
        return out

    def attention(
        self,
        x: int,
        weights: AttentionWeights,
        rope: Tensor,
        caches: Sequence[Sequence[Tensor]],
    ) -> int:
        """x + attention(norm(x)); the new keys and values are written to the caches: those of the
        one sequence, or in a batch of each slot. They are keys and values, (1, capacity, K, Hd)
        each, and of int8 the scales of both, (1, capacity, K) float32. `rope` is (positions, Hd):
        cosines, then sines."""
        H, K, D = weights.heads, weights.kv_heads, weights.q_proj.shape[1]
        Hd = weights.q_proj.shape[0] // H
        qkv, mixed = self._room("qkv", (H + 2 * K) * Hd), self._room("mixed", H * Hd)
        alone = self._S if self._alike or self._batch else 1
        parts = self._kernels.room("parts", alone * _MOST_PARTS * H * (Hd + 2) * 4)
        projections = [weights.q_proj, weights.k_proj, weights.v_proj]
        self._normed(x, weights.norm, projections, qkv)
        keys, values, *scales = map(self._slots, zip(*caches, strict=True))
        cache_type = _CACHE_TYPES[caches[0][0].dtype]
        read = keys, values, mixed, parts, *(scales or [0, 0]), self._batch
        shape = H, K, Hd, cache_type, qkv, *read
        norms = (self._address(norm) for norm in (weights.q_norm, weights.k_norm))
        self._add(_CACHE, *shape, *norms, self._address(rope), self._eps)
        self._add(_ATTEND, *shape, self._flags)
        out = self._room("middle", D)
        self._linear(mixed, [weights.o_proj], out, added=x)
        return out

    def mlp(self, x: int, weights: MLPWeights) -> int:
        """x + down(silu(gate(norm(x))) * up(norm(x)))."""
        F, D = weights.gate_proj.shape
        inner, out = self._room("inner", F), self._room("x", D)
        self._normed(x, weights.norm, [weights.gate_proj, weights.up_proj], inner, _GATED)
        self._linear(inner, [weights.down_proj], out, added=x)
        return out

    def experts(self, x: int, weights: MLPWeights) -> int:
        """x + the MLPs of the chosen experts, by their probabilities."""
        assert weights.router is not None
        E, F, D = weights.gate_proj.shape
        k = weights.k
        names = ("normed", D), ("router", E), ("chosen", k), ("probabilities", k), ("place", k)
        normed, logits, chosen, probabilities, place = (self._room(*name) for name in names)
        first = self._kernels.room("first", (E + 1) * 4)
        gathered, inner = self._room("gathered", k * D), self._room("inner", k * F)
        results, out = self._room("results", k * D), self._room("x", D)
        self._add(_NORM, x, self._address(weights.norm), normed, D, self._eps)
        self._linear(normed, [weights.router], logits)
        self._add(_ROUTE, logits, E, k, weights.sum_to_one, chosen, probabilities)
        self._add(_GROUP, chosen, E, k, first, place)
        gates = [weights.gate_proj, weights.up_proj]
        self._expert_linear(normed, place, k, inner, first, gathered, gates)
        self._expert_linear(inner, 0, k, results, first, 0, [weights.down_proj])
        self._add(_COMBINE, x, results, place, probabilities, k, D, out)
        return out

    def head(self, x: int, norm: Tensor, weight: Matrix, every: bool) -> Tensor:
        """Logits of the last position that is there, (V,), or of every one, (S, V)."""
        V = weight.shape[0]
        shape = (self._S, V) if every else (V,)
        out = Tensor.empty(*shape, dtype=dtypes.float32, device="CPU")
        if every:
            self._normed(x, norm, [weight], self._address(out))
        else:
            self._linear(x, [weight], self._address(out), _LAST_POSITION, norm=norm)
        return self._run(out)

    def part(self, first: int = 0, end: int | None = None) -> Tensor:
        """Some of the steps so far as a kernel that leaves its results in scratch: nothing to read,
        but to be realised."""
        end = len(self) if end is None else end
        numbers = self._numbers[first * _STEP_NUMBERS : end * _STEP_NUMBERS]
        return self._run(Tensor.empty(1, dtype=dtypes.float32, device="CPU"), numbers)

    def __len__(self) -> int:
        return len(self._numbers) // _STEP_NUMBERS

    def _normed(
        self, x: int, norm: Tensor, matrices: Sequence[Matrix], out: int, flags: int = 0
    ) -> None:
        """Products of RMSNorm(x); for few positions every thread norms for itself."""
        if self._alike:
            self._linear(x, matrices, out, flags, norm=norm)
            return
        D = matrices[0].shape[1]
        normed = self._room("normed", D)
        self._add(_NORM, x, self._address(norm), normed, D, self._eps)
        self._linear(normed, matrices, out, flags)

    def _linear(
        self,
        x: int,
        matrices: Sequence[Matrix],
        out: int,
        flags: int = 0,
        added: int = 0,
        norm: Tensor | None = None,
    ) -> None:
        widths = [matrix.shape[0] for matrix in matrices]
        self._add(
            _LINEAR,
            flags | self._flags,
            x,
            0 if norm is None else self._address(norm),
            self._eps,
            out,
            widths[0] if flags & _GATED else sum(widths),
            added,
            len(matrices),
            *(number for matrix in matrices for number in self._matrix(matrix)),
        )

    def _expert_linear(
        self,
        x: int,
        place: int,
        k: int,
        out: int,
        first: int,
        gathered: int,
        matrices: Sequence[Matrix],
    ) -> None:
        E, O, _ = matrices[0].shape
        numbers: list[int] = []
        for matrix in matrices:
            arrays = _arrays(matrix)
            strides = [int(array.nbytes()) // E for array in arrays]
            numbers += self._matrix(matrix, share=k / E)
            numbers += strides + [0] * (_MOST_ARRAYS - len(strides))
        head = self._flags, x, place, k, out, O, first, E, gathered, len(matrices)
        self._add(_EXPERTS, *head, *numbers)

    def _matrix(self, matrix: Matrix, share: float = 1.0) -> list[int]:
        """What matrix() in steps.c reads. `share` is how much of it one position takes."""
        arrays, params = _arrays(matrix), matrix.params
        *experts, outputs, inputs = matrix.shape
        rows = outputs * int(np.prod(experts, dtype=np.int64))
        scales = _SCALES.get(matrix.format)
        self._nbytes += round(matrix.nbytes * share)
        addresses = [self._address(array) for array in arrays]
        return [
            TYPES.index(matrix.format),
            outputs,
            inputs,
            int(arrays[0].nbytes()) // rows,
            params.get("bits", 0),
            params.get("group_size", params.get("block_size", 0)),
            params.get("zero_offset", 0),
            0 if scales is None else _FLOAT_TYPES[arrays[scales].dtype],
            *addresses,
            *[0] * (_MOST_ARRAYS - len(addresses)),
        ]

    def _room(self, name: str, width: int) -> int:
        """The address of scratch for (S, width) numbers of four bytes."""
        return self._kernels.room(name, self._S * width * 4)

    def _slots(self, caches: tuple[Tensor, ...]) -> int:
        """The address of the one cache, or in a batch of the addresses of all."""
        addresses = [self._address(cache) for cache in caches]
        if not self._batch:
            return addresses[0]
        return self._address(self._kernels.keep(np.array(addresses, dtype=np.int64)))

    def _address(self, tensor: Tensor) -> int:
        buffer: Any = tensor.uop.base.buffer
        return int(buffer.ensure_allocated()._buf.va_addr)

    def _add(self, step: int, *numbers: int) -> None:
        assert len(numbers) < _STEP_NUMBERS
        self.described.append((_FUNCTIONS[step], self._nbytes - self._told_nbytes))
        self._told_nbytes = self._nbytes
        self._numbers += [step, *numbers, *[0] * (_STEP_NUMBERS - 1 - len(numbers))]

    def _run(self, out: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """`out` once these steps are done; None: all so far."""
        numbers = self._numbers if numbers is None else numbers
        length = len(numbers) // _STEP_NUMBERS
        list_ = self._kernels.keep(np.array([length, *numbers], dtype=np.int64))
        kernel = _program(self._nbytes)
        arguments = self._kernels.pool, list_, out, self._at
        return Tensor.custom_kernel(*arguments, fxn=lambda *_: kernel)[2]


def _arrays(matrix: Matrix) -> list[Tensor]:
    names = _ARRAYS.get(matrix.format, tuple(matrix.arrays))
    return [matrix.arrays[name] for name in names if name in matrix.arrays]


def _program(nbytes: int) -> Any:
    """A finished tinygrad program with four arguments: the pool, the list, what is written, and the
    position. `nbytes` are those of weights that it reads for one position."""
    from tinygrad.device import Device
    from tinygrad.renderer import Estimates
    from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

    name = "qwen3_tg_cpu_call"
    text = (
        "typedef unsigned long long u64;\n"
        f"void {name}(u64 a, u64 b, u64 c, u64 d) {{\n"
        "    const u64 args[] = {a, b, c, d};\n"
        "    (*(void (**)(u64, const u64 *))a)(a, args);\n"
        "}\n"
    )
    target = Device["CPU"].renderer.target
    info = ProgramInfo(name, globals=(0, 1, 2, 3), outs=(2,), ins=(0, 1, 3), target=target)
    sink = UOp(Ops.SINK, arg=KernelInfo(name, estimates=Estimates(mem=nbytes, lds=nbytes)))
    parts = (sink, UOp(Ops.LINEAR), UOp(Ops.SOURCE, arg=text), UOp(Ops.BINARY, arg=compiled(text)))
    return UOp(Ops.PROGRAM, src=parts, arg=info)


def _bits(value: float) -> int:
    """A float32 as an int32 of the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
