"""From what a user types after `--model` (`tiny`, a path, a name in the hub's cache) to a path."""

from __future__ import annotations

import contextlib
from pathlib import Path

from qwen3_tg.errors import CheckpointError

TINY = Path(__file__).parent.parent / "tiny"


def locate(model: str) -> Path:
    """The directory (or file) of a model. Never asks the network.

    Raises CheckpointError that says how to get the model when it is not on this machine."""
    if model == "tiny":
        return TINY
    with contextlib.suppress(OSError, RuntimeError):  # a name too long, ~nobody
        path = Path(model).expanduser()
        if model and path.exists():  # Path("") is the current directory
            return path
    looks_like_path = model.startswith((".", "/", "~", "\\")) or model.count("/") > 1
    if looks_like_path or not model:
        raise CheckpointError(f"{model!r}: no such directory; give a folder that has config.json")
    name = model if "/" in model else f"Qwen/{model}"
    return _hub_cache(name, model)


def _hub_cache(name: str, typed: str) -> Path:
    # huggingface_hub takes half a second to import, so only when a hub name is asked for
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(
            f"{typed!r} is neither a directory nor a model name such as Qwen/Qwen3-0.6B"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{typed!r} is no directory here, and {name} is not in the local cache "
            f"({constants.HF_HUB_CACHE}); get it with: hf download {name}"
        ) from None
