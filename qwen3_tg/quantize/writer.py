"""Writes a GGUF file tensor by tensor, and counts what the rounding cost.

A tensor is read, rounded and written in parts of some rows, on all cores; nothing is held whole.
The file gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from qwen3_tg.checkpoint.types import FLOATS, Checkpoint, StackedWeight, StoredWeight
from qwen3_tg.errors import CheckpointError, Qwen3Error, UnsupportedError, UsageError
from qwen3_tg.quantize.blocks import dequantise, quantise
from qwen3_tg.quantize.metadata import add_model, add_tokenizer, architecture
from qwen3_tg.quantize.types import CHOICES, Tensor, choose_types

ALIGNMENT = 32
_VALUES_AT_ONCE = 1 << 17  # about what a core's cache holds with its intermediate values
_MOST_THREADS = 16
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # of a split file


@dataclass(frozen=True)
class Cost:
    """What the rounding cost all tensors of one kind and type: `error` is the root of the mean
    square of the change, relative to that of the weights."""

    kind: str
    type: str
    weights: int
    error: float


@dataclass(frozen=True)
class Report:
    """What was written. `bytes_before` are those of the checkpoint's weights, `bytes_after` those
    of the file. `error` is the relative one of all matrices together, without norms and routers,
    which are kept as they are."""

    out: Path
    type: str
    weights: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    error: float
    costs: list[Cost]
    notes: list[str]


def write_gguf(
    checkpoint: Checkpoint,
    out: Path,
    type: str,
    name: str,
    embeddings: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a float checkpoint as one GGUF file, `type` being a key of CHOICES.

    `name` is what the file calls the model. `on_progress` is called with bytes of the checkpoint
    done and all of them. OUT.part beside the file holds it until it is complete, and is removed
    whatever happens. Raises UsageError, CheckpointError for a weight that is not finite or not in
    the range of the type, UnsupportedError for what GGUF cannot say."""
    _refuse_quantised(checkpoint)
    out = _checked(out, checkpoint.path, overwrite)
    writer = GGUFWriter(None, architecture(checkpoint.config))
    tensors, notes = choose_types(
        checkpoint.weights, type, embeddings, checkpoint.config.num_hidden_layers
    )
    writer.add_custom_alignment(ALIGNMENT)
    add_model(writer, checkpoint, name, CHOICES[type][1])
    notes += add_tokenizer(writer, checkpoint)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        shape, dtype = tensor.stored.shape, np.dtype(np.float32)
        writer.add_tensor_info(tensor.gguf_name, shape, dtype, tensor.nbytes, kind)
    _check_space(out, sum(_padded(tensor.nbytes) for tensor in tensors))
    with _part_of(out, overwrite) as part:
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with part.open("ab") as file:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            costs, error = _write_tensors(file, tensors, on_progress)
            file.flush()
            os.fsync(file.fileno())
            nbytes = file.tell()
    weights = sum(cost.weights for cost in costs)
    return Report(
        out=out,
        type=type,
        weights=weights,
        bytes_before=sum(tensor.stored.nbytes for tensor in tensors),
        bytes_after=nbytes,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / weights,
        error=error,
        costs=costs,
        notes=notes,
    )


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    found = sorted({w.format for w in checkpoint.weights.values()} - set(FLOATS))
    if found:
        raise UnsupportedError(
            f"{checkpoint.path} is quantised already ({', '.join(found)}): what was rounded away "
            "does not come back, and rounding again adds to it; take the float checkpoint of the "
            "same model"
        )


def _checked(out: Path, source: Path, overwrite: bool) -> Path:
    """The file to write, links followed. Raises UsageError for one that must not be written."""
    out, source = out.expanduser().resolve(), source.resolve()
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give the name of a file, such as {out}/model.gguf")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such directory")
    if source.is_dir() and source in out.parents:
        raise UsageError(f"{out} lies in the checkpoint itself; write it to another directory")
    is_part = _PART.search(out.name) and _PART.sub("", out.name) == _PART.sub("", source.name)
    if (out.exists() and out.samefile(source)) or (is_part and out.parent == source.parent):
        raise UsageError(f"{out} is the checkpoint itself; give another name")
    if out.exists() and not out.is_file():
        raise UsageError(f"{out} is not a regular file")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; --force overwrites it")
    return out


def _check_space(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise Qwen3Error(
            f"{out.parent}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "make room, choose a smaller --type or another disk"
        )


@contextlib.contextmanager
def _part_of(out: Path, overwrite: bool) -> Iterator[Path]:
    """A file beside `out` that becomes it at the end, or is removed."""
    part = out.with_name(f"{out.name}.part")
    try:
        if overwrite:
            part.unlink(missing_ok=True)
        part.touch(exist_ok=False)
    except FileExistsError:
        raise UsageError(
            f"{part} exists: another run is writing it, or one was killed; remove it, or --force"
        ) from None
    except OSError as e:
        raise Qwen3Error(f"{part}: cannot be written: {e.strerror}") from None
    try:
        yield part
        part.replace(out)
    except OSError as e:
        raise Qwen3Error(f"{part}: cannot be written: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name, on disk; not every system can
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Sums:
    """Squares of the weights and of their changes."""

    def __init__(self) -> None:
        self.weights, self.squares, self.changes = 0, 0.0, 0.0

    def add(self, weights: int, squares: float, changes: float) -> None:
        self.weights += weights
        self.squares += squares
        self.changes += changes

    @property
    def error(self) -> float:
        return math.sqrt(self.changes / self.squares) if self.squares else 0.0


def _write_tensors(
    file: BinaryIO, tensors: list[Tensor], on_progress: Callable[[int, int], None] | None
) -> tuple[list[Cost], float]:
    total, done = sum(tensor.stored.nbytes for tensor in tensors), 0
    sums: dict[tuple[str, str], _Sums] = defaultdict(_Sums)
    matrices = _Sums()
    threads = min(_cores(), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            for rounded in _in_order(pool, 2 * threads, tensor):
                file.write(rounded.data.tobytes())
                found = (rounded.weights, rounded.squares, rounded.changes)
                sums[tensor.kind, tensor.type].add(*found)
                if not tensor.is_kept:
                    matrices.add(*found)
                done += rounded.bytes_read
                if on_progress:
                    on_progress(done, total)
            tensor.stored.release()
            file.write(b"\0" * (-tensor.nbytes % ALIGNMENT))
    kinds = list(dict.fromkeys(tensor.kind for tensor in tensors))
    costs = [Cost(*key, found.weights, found.error) for key, found in sums.items()]
    return sorted(costs, key=lambda cost: kinds.index(cost.kind)), matrices.error


@dataclass(frozen=True)
class _Rounded:
    """Some rows as they are written: what they cost, as in _Sums."""

    data: NDArray[np.uint8]
    bytes_read: int
    weights: int
    squares: float
    changes: float


def _in_order(pool: ThreadPoolExecutor, ahead: int, tensor: Tensor) -> Iterator[_Rounded]:
    """The parts of a tensor, at most `ahead` of them in work."""
    waiting: deque[Future[_Rounded]] = deque()
    try:
        for rows in _parts(tensor.stored):
            waiting.append(pool.submit(_round, rows, tensor))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _parts(stored: StoredWeight) -> Iterator[np.ndarray]:
    """(rows, I) each, in the order of the file; views, of one expert at a time."""
    stack = stored.experts if isinstance(stored, StackedWeight) else (stored,)
    for weight in stack:
        matrix = weight.arrays["data"].reshape(-1, weight.shape[-1])
        rows = max(1, _VALUES_AT_ONCE // matrix.shape[-1])
        for start in range(0, len(matrix), rows):
            yield matrix[start : start + rows]


def _round(rows: np.ndarray, tensor: Tensor) -> _Rounded:
    x = _as_float32(rows, tensor.stored.format)
    if not np.isfinite(x).all():
        raise CheckpointError(f"{tensor.name} holds NaN or infinity: the checkpoint is damaged")
    data = quantise(x, tensor.type)
    change = dequantise(data, tensor.type) - x
    if not np.isfinite(change).all():
        raise CheckpointError(
            f"{tensor.name} holds values up to {np.abs(x).max():.3g}, beyond the range of "
            f"{tensor.type}; take bf16 or f32 as --type"
        )
    squares, changes = (float(np.square(v, dtype=np.float64).sum()) for v in (x, change))
    return _Rounded(data, rows.nbytes, x.size, squares, changes)


def _as_float32(stored: np.ndarray, format: str) -> NDArray[np.float32]:
    if format == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
