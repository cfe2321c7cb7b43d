"""Keep lowered kernels on disk, so that a second process does not lower them again.

tinygrad keeps compiled code on disk, but turns the description of every kernel into source anew in
each process: seconds of Python before the first token. It has a table of finished programs in
memory (`to_program_cache`); this module loads that table at the start and saves it when it grew.
The file is a pickle, and so is trusted only where it is this user's own. It holds code for one
tinygrad, one compiler and one processor (`fingerprint`).

Touches tinygrad's internals: `tinygrad.codegen.to_program_cache`, and the progress bar that its
compiling has.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qwen3_tg.compiler import is_ours


class KernelCache:
    """The programs of one kind of model on one device, in one file.

    Programs that the process had before, for another model, are not written to it."""

    def __init__(self, directory: Path, fingerprint: str):
        from tinygrad.codegen import to_program_cache

        self._path = directory / f"programs-{fingerprint}.pickle"
        self._of_others = frozenset(to_program_cache)
        self._saved = len(to_program_cache)
        self.on_kernels: Callable[[int, int], None] | None = None

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """While this lasts, `on_kernels` is told how many of a graph's new kernels are made."""
        from tinygrad.engine import realize

        module: Any = realize
        before, module.tqdm = module.tqdm, partial(_Report, self.on_kernels)
        try:
            yield
        finally:
            module.tqdm = before

    def load(self) -> None:
        """Put the programs on disk into tinygrad's table. A missing or damaged file is an empty
        one: it costs time, never a result."""
        from tinygrad.codegen import to_program_cache

        try:
            if not is_ours(self._path):
                return
            with self._path.open("rb") as file:
                programs = dict(pickle.load(file))
        except Exception:  # not there, or damaged in any way: written anew at the next save
            return
        for key, program in programs.items():
            to_program_cache.setdefault(key, program)
        self._of_others -= set(programs)
        self._saved = len(to_program_cache)

    def save(self) -> None:
        """Write the table if it has grown since; whole or not at all. An unwritable directory is
        no error: the next start is slower, nothing else."""
        from tinygrad.codegen import to_program_cache

        if len(to_program_cache) == self._saved:
            return
        self._saved = len(to_program_cache)
        ours = {k: v for k, v in to_program_cache.items() if k not in self._of_others}
        try:
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                file = Path(folder) / "programs"
                file.write_bytes(pickle.dumps(ours, protocol=pickle.HIGHEST_PROTOCOL))
                file.replace(self._path)
        except OSError:
            return


class _Report:
    """Stands in for the bar that tinygrad shows while it compiles, if it is told to."""

    def __init__(
        self, on_kernels: Callable[[int, int], None] | None, total: int, **looks: Any
    ) -> None:
        self._on_kernels, self._done, self._total = on_kernels, 0, total

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def set_description(self, text: str) -> None:
        pass

    def update(self, count: int) -> None:
        self._done += count
        if self._on_kernels:
            self._on_kernels(self._done, self._total)
