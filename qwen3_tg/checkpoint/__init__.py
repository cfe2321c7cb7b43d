"""Where a model's files are and what is in them: one reader a format, all giving a `Checkpoint`.

Nothing here imports tinygrad: planning and converting need no device. To add a format, write one
module with an `open_...(path) -> Checkpoint` and give it a line in `open_checkpoint`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen3_tg.checkpoint.fingerprint import fingerprint
from qwen3_tg.checkpoint.gguf import open_gguf
from qwen3_tg.checkpoint.gguf_names import gguf_models
from qwen3_tg.checkpoint.hf_directory import open_hf_directory
from qwen3_tg.checkpoint.locate import locate
from qwen3_tg.checkpoint.types import Checkpoint, StoredWeight, unpack, unpacked_at_load
from qwen3_tg.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "StoredWeight",
    "fingerprint",
    "locate",
    "open_checkpoint",
    "unpack",
    "unpacked_at_load",
]


def open_checkpoint(model: str) -> Checkpoint:
    """Open `tiny`, a directory, a GGUF file, or a hub name that is in the local cache; reads
    headers only.

    Raises CheckpointError naming every file or tensor that is missing or wrong."""
    path = locate(model)
    try:
        if path.is_dir():
            path = _gguf_of(path) or path
        checkpoint = open_hf_directory(path) if path.is_dir() else open_gguf(path)
    except OSError as e:
        raise CheckpointError(f"{path}: not readable: {e.strerror or e}") from None
    return replace(checkpoint, notes=(*checkpoint.notes, *unpacked_at_load(checkpoint.weights)))


def _gguf_of(folder: Path) -> Path | None:
    """The GGUF file, of parts the first, of a folder that has no other weights."""
    names = [path.name for path in folder.iterdir()]
    models = gguf_models(names)
    if not models or any(name.endswith(".safetensors") for name in names):
        return None
    if len(models) > 1:
        raise CheckpointError(
            f"{folder}: several GGUF models; name the file of one: "
            + ", ".join(files[0] for files in models.values())
        )
    return folder / next(iter(models.values()))[0]
