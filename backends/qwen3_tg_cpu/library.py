"""The C program: compiled once, loaded once, with one pool of threads a process.

Touches tinygrad's internals: `Device`, its compiler and its `CPUProgram`, which loads an object
file into memory and finds the libc functions it names.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sqlite3
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = ("threads.c", "vectors.c", "types.c", "products.c", "attention.c", "steps.c")
MAX_THREADS = 256
_POOL_BYTES = 1 << 16  # threads.c checks that the struct Pool is no larger
_WANTED = 1  # the second of its 8-byte fields
_LINE = 128
_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds of each so many microseconds


def source() -> str:
    """The text of the whole program."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


class Library:
    """The loaded program and its pool. `pool` is the address of the struct Pool."""

    def __init__(self) -> None:
        from tinygrad.device import Device, TinyELF

        device: Any = Device["CPU"]
        elf = TinyELF(compiled(source()), "qwen3_tg_cpu", device.renderer.target, ())
        self._program = device.runtime(elf)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(self._program.addr)
        # Private memory, not tinygrad's, which a forked child would share with its parent.
        self._memory = np.zeros(_POOL_BYTES + _LINE, dtype=np.uint8)
        self.pool = (self._memory.ctypes.data + _LINE - 1) // _LINE * _LINE
        start = self.pool - self._memory.ctypes.data
        self._fields = self._memory[start : start + _POOL_BYTES].view(np.int64)
        self._threads = physical_cores()
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.stop)

    @property
    def threads(self) -> int:
        """Threads that compute, with the calling one."""
        return self._threads

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on, for all models of this process."""
        self._threads = min(threads, MAX_THREADS)
        self._fields[_WANTED] = self._threads

    def stop(self) -> None:
        """End all helping threads; the next kernel starts them again."""
        self._call(self.pool, None)

    def _reset(self) -> None:
        """As new: a forked child has none of its parent's threads."""
        self._fields[:] = 0
        self._fields[0], self._fields[_WANTED] = self._program.addr, self._threads
        self.stop()


@cache
def compiled(text: str) -> bytes:
    """An object file of a C text, from tinygrad's cache of compiled kernels where it is there."""
    from tinygrad.device import Device

    device: Any = Device["CPU"]
    compiler = device.renderer.compiler
    try:
        code: bytes = compiler.compile_cached(text)
    except sqlite3.ProgrammingError:  # the cache was opened by another thread, and is for that one
        code = compiler.compile(text)
    return code


@cache
def library() -> Library:
    """The process's one Library. Raises whatever the compiler or the loader raises."""
    return Library()


def physical_cores() -> int:
    """Cores this process may use, counted once where two hardware threads share one, and no more
    than a container's share of time is worth."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS: no affinity, and one hardware thread a core
        return os.cpu_count() or 1
    return max(1, min(_cores_of(allowed), _container_share()))


def _container_share() -> int:
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # not in one, or "max"
        return MAX_THREADS


def _cores_of(allowed: set[int]) -> int:
    cores = set()
    for cpu in allowed:
        topology = _TOPOLOGY / f"cpu{cpu}" / "topology"
        try:
            ids = tuple(
                (topology / name).read_text() for name in ("physical_package_id", "core_id")
            )
        except OSError:
            return len(allowed)
        cores.add(ids)
    return len(cores)
