"""Keep lowered kernels on disk, so that a second process does not lower them again.

tinygrad keeps compiled code on disk, but turns the description of every kernel into source anew in
each process: seconds of Python before the first token. It has a table of finished programs in
memory (`to_program_cache`); this module loads that table at the start and saves it when it grew.
The file is a pickle in the user's own cache directory, like tinygrad's own cache, and holds code
for one tinygrad, one compiler and one processor (`fingerprint`).

Touches tinygrad's internals: `tinygrad.codegen.to_program_cache`.
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path


class KernelCache:
    """The programs of one (device, compiler, processor, tinygrad version) in one file."""

    def __init__(self, directory: Path, fingerprint: str):
        self._path = directory / f"programs-{fingerprint}.pickle"
        self._saved = 0

    def load(self) -> None:
        """Put the programs on disk into tinygrad's table. A missing or damaged file is an empty
        one: it costs time, never a result."""
        from tinygrad.codegen import to_program_cache

        try:
            with self._path.open("rb") as file:
                programs = pickle.load(file)
        except Exception:  # not there, or damaged in any way: written anew at the next save
            return
        for key, program in programs.items():
            to_program_cache.setdefault(key, program)
        self._saved = len(to_program_cache)

    def save(self) -> None:
        """Write the table if it has grown since; whole or not at all. An unwritable directory is
        no error: the next start is slower, nothing else."""
        from tinygrad.codegen import to_program_cache

        if len(to_program_cache) == self._saved:
            return
        self._saved = len(to_program_cache)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                pickle.dump(dict(to_program_cache), file, protocol=pickle.HIGHEST_PROTOCOL)
            Path(file.name).replace(self._path)
        except OSError:
            return
