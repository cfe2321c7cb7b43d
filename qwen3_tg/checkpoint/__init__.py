"""Where a model's files are and what is in them: one reader a format, all giving a `Checkpoint`.

Nothing here imports tinygrad: planning and converting need no device. To add a format, write one
module with an `open_...(path) -> Checkpoint` and give it a line in `open_checkpoint`.
"""

from __future__ import annotations

from qwen3_tg.checkpoint.hf_directory import open_hf_directory
from qwen3_tg.checkpoint.locate import locate
from qwen3_tg.checkpoint.types import Checkpoint, StoredWeight, unpack
from qwen3_tg.errors import CheckpointError, UnsupportedError

__all__ = ["Checkpoint", "StoredWeight", "locate", "open_checkpoint", "unpack"]


def open_checkpoint(model: str) -> Checkpoint:
    """Open `tiny`, a directory, or a hub name that is in the local cache; reads headers only.

    Raises CheckpointError naming every file or tensor that is missing or wrong."""
    path = locate(model)
    if path.is_file():
        raise UnsupportedError(
            f"{path}: a single file (GGUF and the like are not supported yet); expected a "
            "Hugging Face directory with config.json and *.safetensors"
        )
    try:
        return open_hf_directory(path)
    except OSError as e:
        raise CheckpointError(f"{path}: not readable: {e.strerror or e}") from None
