"""From what a user types after `--model` (`tiny`, a path, a name in the hub's cache) to a path."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from qwen3_tg.checkpoint.gguf_names import choose_gguf, gguf_models
from qwen3_tg.errors import CheckpointError
from qwen3_tg.hub import full_name

TINY = Path(__file__).parent.parent / "tiny"


def locate(model: str) -> Path:
    """The directory, or the GGUF file (of parts the first), of a model. Never asks the network.

    A name may say which GGUF of a model: Qwen/Qwen3-8B-GGUF:Q4_K_M. Raises CheckpointError that
    says how to get the model when it is not on this machine."""
    if model == "tiny":
        return TINY
    with contextlib.suppress(OSError, RuntimeError):  # a name too long, ~nobody
        path = Path(model).expanduser()
        if model and path.exists():  # Path("") is the current directory
            return path
    looks_like_path = model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1
    if looks_like_path or not model:
        raise CheckpointError(f"{model!r}: no such directory; give a folder that has config.json")
    name, _, kind = model.partition(":")
    if name.lower() == "qwen3":  # ollama's spelling, such as qwen3:8b
        name, kind = model, ""
    return _in_cache(full_name(name), kind, model)


def cache_folder(name: str) -> Path:
    """Where huggingface_hub's cache has a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _in_cache(name: str, kind: str, typed: str) -> Path:
    part = r"\w[\w.-]*"
    strange = ".." in name or "--" in name or name.endswith(".git")
    if strange or not re.fullmatch(f"{part}/{part}", name, re.ASCII):
        raise CheckpointError(
            f"{typed!r} is neither a directory nor a model name such as Qwen/Qwen3-0.6B"
        )
    for candidate in (name, f"{name}-GGUF") if kind else (name,):
        if (snapshot := _snapshot(cache_folder(candidate))) is None:
            continue
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
        if kind and (files or candidate != name):
            return snapshot / choose_gguf(files, kind, candidate)[0]
        if not kind:
            return _only_model(snapshot, files, candidate)
    raise CheckpointError(
        f"{typed!r} is no directory here, and {name} is not in the local cache "
        f"({cache_folder(name).parent}); get it with: qwen3 pull {name}"
        + (f" --type {kind}" if kind else "")
    )


def _snapshot(folder: Path) -> Path | None:
    """The files of the commit that was `main` when it was fetched; or else the only ones there."""
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-f]+", commit) and (snapshots / commit).is_dir():
            return snapshots / commit
    except (OSError, UnicodeDecodeError):
        pass
    try:
        found = [path for path in snapshots.iterdir() if path.is_dir()]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _only_model(snapshot: Path, files: list[str], name: str) -> Path:
    """The snapshot, or the GGUF in it where it has nothing else."""
    models = gguf_models(files)
    if not models or any(snapshot.glob("*.safetensors")):
        return snapshot
    if len(models) > 1:
        raise CheckpointError(
            f"{name} has several models; say which: "
            + " or ".join(f"--model {name}:{kind}" for kind in models)
        )
    return snapshot / choose_gguf(files, next(iter(models)), name)[0]
