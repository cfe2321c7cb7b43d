"""The C compiler that tinygrad's CPU device needs: find a clang, or take the one in PyPI's ziglang.

tinygrad calls one executable, named by the environment variable CC, with clang's arguments. gcc
does not take them, and clang before 16 computes bfloat16 wrongly. The PyPI package `ziglang`
carries a whole clang behind `zig clang`, so a machine without any compiler needs nothing but pip.

tinygrad reads CC at its first kernel and the place of its kernel cache when it is imported, each
only once, so `prepare_environment` comes before both.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from qwen3_tg import pip_libraries

OLDEST_CLANG = 16
NEWEST_CLANG = 23
HOW_TO_GET = (
    "install one with: pip install 'qwen3-tg[compiler]' (or pip install ziglang), "
    "or clang 16 or newer (Debian and Ubuntu: apt install clang-19; macOS: xcode-select --install)"
)


@dataclass(frozen=True)
class Compiler:
    """An executable that takes clang's arguments, and the first line of its --version."""

    executable: Path
    version: str


def cache_dir() -> Path:
    """Our folder in the user's cache, for compiled kernels and the compiler's wrapper.

    What lies there is run, so it must be ours alone: where it cannot be written, or others own it
    or can write in it, a folder is given that is deleted when this process ends."""
    try:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        directory = Path(os.environ.get("XDG_CACHE_HOME") or base) / "qwen3_tg"
        directory.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK) and is_ours(directory):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return _temporary_dir()


def is_ours(path: Path) -> bool:
    """Whether this user owns the path and no other can write it; raises OSError."""
    status = path.stat()
    by_others = stat.S_IWGRP | stat.S_IWOTH
    return os.name == "nt" or (status.st_uid == os.geteuid() and not status.st_mode & by_others)


@cache
def _temporary_dir() -> Path:
    directory = tempfile.mkdtemp(prefix="qwen3_tg-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@cache
def find_compiler() -> Compiler | None:
    """The first that fits of: CC, clang from the newest to the plain name, ziglang; else None."""
    asked = os.environ.get("CC", "")
    names = [f"clang-{n}" for n in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)]
    for name in (asked, *names, "clang"):
        if (found := shutil.which(name) if name else None) and (fits := _clang(Path(found))):
            return fits
    return _ziglang()


def fingerprint() -> str:
    """Changes with whatever compiled code depends on: tinygrad, the compiler, the processor."""
    compiler = find_compiler()
    parts = [version("tinygrad"), platform.machine(), _processor(), sys.version]
    parts += [str(compiler.executable), compiler.version] if compiler else ["none"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prepare_environment() -> None:
    """Point tinygrad to the compiler, and to a kernel cache of its own for this compiler and
    processor unless the user set CACHEDB; to libraries that came
    with pip; have it compile in this process where there can be no
    pool of processes. tinygrad, imported before, has already read the latter two."""
    if compiler := find_compiler():
        os.environ["CC"] = str(compiler.executable)
    pip_libraries.point_tinygrad_to_them()
    if "tinygrad" in sys.modules:
        return
    if not _processes_can_share_locks():
        os.environ["PARALLEL"] = "0"
    if "CACHEDB" in os.environ:
        return
    kernels = cache_dir() / f"kernels-{fingerprint()}.db"
    _delete_if_damaged(kernels)
    os.environ["CACHEDB"] = str(kernels)


def _delete_if_damaged(database: Path) -> None:
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:  # another process is writing
        return
    except sqlite3.DatabaseError:
        database.unlink(missing_ok=True)


def _clang(executable: Path) -> Compiler | None:
    if sys.platform == "darwin" and executable == Path("/usr/bin/clang"):
        # without the command line tools this is a stub that opens a window when run
        if subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0:
            return None
    try:
        run = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = run.stdout.partition("\n")[0]
    found = re.search(r"clang version (\d+)", line)
    # Apple counts its own way: its clang 15 is LLVM's 16
    oldest = OLDEST_CLANG - 1 if line.startswith("Apple") else OLDEST_CLANG
    if run.returncode != 0 or not found or int(found[1]) < oldest:
        return None
    return Compiler(executable, line)


def _ziglang() -> Compiler | None:
    """tinygrad takes one executable and no arguments, so `zig clang` needs a script around it."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations or os.name == "nt":
        return None
    zig = Path(spec.submodule_search_locations[0]) / "zig"
    if not os.access(zig, os.X_OK):
        return None
    text = f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n'
    name = f"zig-clang-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    script = cache_dir() / name
    if not script.is_file() or script.read_text() != text:
        _write_script(script, text)
    return _clang(script)


def _processes_can_share_locks() -> bool:
    """False in some sandboxes and containers, where /dev/shm is missing or not writable."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (ImportError, OSError):
        return False
    return True


def _write_script(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(stat.S_IRWXU)
    Path(file.name).replace(path)


def _processor() -> str:
    """Compiled code is for this very processor (-march=native): its model and features."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))
