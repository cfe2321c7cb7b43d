"""Fetch a model from the hub into the cache of huggingface_hub, where `--model NAME` finds it.

A file gets its final name only when it is whole and has the sum that the hub announces. What has
come of it until then stays under blobs/SUM.incomplete and is continued the next time. Nothing here
prints.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from rich.filesize import decimal

from qwen3_tg.checkpoint.gguf_names import choose_gguf, gguf_models
from qwen3_tg.checkpoint.hf_directory import shard_names
from qwen3_tg.checkpoint.locate import cache_folder
from qwen3_tg.errors import CheckpointError
from qwen3_tg.hub import (
    HubFile,
    Interrupted,
    Listing,
    Misled,
    NotOnHub,
    Tries,
    full_name,
    list_files,
    open_file,
)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What the readers look for besides the weights.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_OTHER_PLACE = "HF_HUB_CACHE can name a folder elsewhere"
_GO_ON = "the same command goes on where it stopped"
_LARGEST_TEXT_BYTES = 50_000_000
_LONG_CHECK_BYTES = 1_000_000_000  # a few seconds


class Watcher(Protocol):
    """Told of what happens while a model is fetched."""

    def note(self, text: str) -> None:
        """Something that a user should know, such as a pause before another try."""

    def progress(self, file: HubFile, done_bytes: int) -> None:
        """So much of a file is here. It may fall, when a file is started again."""

    def finished(self, file: HubFile) -> None:
        """A file is here, whole and checked."""


@dataclass(frozen=True)
class Plan:
    """What will be fetched: `missing` of `files`; `begun` is what is here of those, in bytes by
    name. `snapshot` is the folder they will be in."""

    listing: Listing
    revision: str | None
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    begun: Mapping[str, int]
    folder: Path
    free_bytes: int

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.listing.commit

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fetch_bytes(self) -> int:
        return sum(file.size for file in self.missing) - sum(self.begun.values())


def plan_pull(name: str, kind: str | None, revision: str | None, watcher: Watcher) -> Plan:
    """Ask the hub what a model has, and look at what is here of it. `kind` is a type of GGUF.

    Raises CheckpointError, also when the disk has no room or cannot be written."""
    listing = _find(full_name(name), kind, revision, watcher)
    files = tuple(_needed(listing, kind, watcher))
    folder = cache_folder(listing.name)
    snapshot = folder / "snapshots" / listing.commit
    missing, begun = [], {}
    for file in files:
        if _size(snapshot / file.name) == file.size or _size(_blob(folder, file)) == file.size:
            continue
        missing.append(file)
        if (have := _size(_incomplete(folder, file)) or 0) <= file.size:
            begun[file.name] = have
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    plan = Plan(listing, revision, files, tuple(missing), begun, folder, free_bytes)
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{existing} is not writable; {_OTHER_PLACE}")
    if plan.fetch_bytes > free_bytes:
        raise CheckpointError(
            f"{listing.name} needs {decimal(plan.fetch_bytes)} more, and {existing} has "
            f"{decimal(free_bytes)} free; {_OTHER_PLACE}"
        )
    return plan


def fetch(plan: Plan, watcher: Watcher) -> Path:
    """Fetch what is missing, and give the snapshot's folder.

    Raises CheckpointError; then, as after Ctrl-C, what has come of a file waits to be continued."""
    try:
        for file in plan.missing:
            with _lock(plan, file, watcher):
                if _size(_blob(plan.folder, file)) != file.size:
                    _fetch_file(plan, file, watcher)
            watcher.finished(file)
        _link(plan)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"cannot write: {e.strerror or e}"
        where = e.filename or plan.folder
        raise CheckpointError(f"{where}: {what}; {_GO_ON} ({_OTHER_PLACE})") from e
    return plan.snapshot


def type_sizes(listing: Listing) -> dict[str, int]:
    """The types of GGUF that a model has, with their bytes."""
    return {
        kind: sum(listing.files[name].size for name in names)
        for kind, names in gguf_models(listing.files).items()
    }


def _find(name: str, kind: str | None, revision: str | None, watcher: Watcher) -> Listing:
    """The listing of a name; with a type of GGUF also that of NAME-GGUF, as Qwen names them."""
    if kind is None or name.lower().endswith("-gguf"):
        return list_files(name, revision, watcher.note)
    with contextlib.suppress(NotOnHub):
        listing = list_files(name, revision, watcher.note)
        if type_sizes(listing):
            return listing
    try:
        return list_files(f"{name}-GGUF", revision, watcher.note)
    except NotOnHub as e:
        raise NotOnHub(f"{name} has no GGUF files on the hub, and {e}") from None


def _needed(listing: Listing, kind: str | None, watcher: Watcher) -> list[HubFile]:
    """The files that a reader needs. Raises CheckpointError where there is nothing to read."""
    name, files = listing.name, listing.files
    if kind is not None:
        return [files[file] for file in choose_gguf(files, kind, name)]
    if _WEIGHTS in files:
        weights = [_WEIGHTS]
    elif _INDEX in files:
        weights = [_INDEX, *_shards(listing, watcher)]
    elif types := type_sizes(listing):
        sizes = ", ".join(f"{kind} ({decimal(size)})" for kind, size in types.items())
        raise CheckpointError(
            f"{name} has GGUF files; say which with --type (qwen3 pull {name} --type "
            f"{next(iter(types))}): {sizes}"
        )
    else:
        raise CheckpointError(f"{name} has no weights in a form that is read: no {_WEIGHTS}")
    if lost := [file for file in ("config.json", *weights) if file not in files]:
        raise CheckpointError(f"{name} has no {lost[0]} on the hub")
    return [files[file] for file in (*_TEXTS, *weights) if file in files]


def _shards(listing: Listing, watcher: Watcher) -> list[str]:
    """The files that the index names: it is fetched before it is known what else to fetch."""
    where = f"{listing.name}: {_INDEX}"
    try:
        index = json.loads(_fetch_text(listing, listing.files[_INDEX], watcher))
    except ValueError as e:
        raise CheckpointError(f"{where} is not JSON: {e}") from None
    return shard_names(index.get("weight_map") if isinstance(index, dict) else None, where)


def _fetch_text(listing: Listing, file: HubFile, watcher: Watcher) -> bytes:
    if file.size > _LARGEST_TEXT_BYTES:
        raise CheckpointError(f"{listing.name}: {file.name} of {decimal(file.size)} is no index")
    tries = Tries(watcher.note, reached=True)
    while True:
        try:
            text = b""
            with open_file(listing, file) as body:
                for chunk in body.chunks:
                    text += chunk
                    if len(text) >= file.size:
                        break
            if _sum(file, text[: file.size]) == file.etag:
                return text[: file.size]
            raise Interrupted(f"{file.name}: its content has not the sum that the hub announces")
        except Interrupted as e:
            tries.wait(e)
        except Misled as e:
            raise CheckpointError(f"{listing.name}: {e}") from None


def _fetch_file(plan: Plan, file: HubFile, watcher: Watcher) -> None:
    part = _incomplete(plan.folder, file)
    for last in (False, True):
        try:
            if _transfer(plan, file, part, watcher) == file.etag:
                part.replace(_blob(plan.folder, file))
                return
            problem = f"{file.name}: its content has not the sum that the hub announces"
        except Misled as e:
            problem = str(e)
        part.unlink()
        if not last:
            watcher.note(f"{problem}; starting it again")
    raise CheckpointError(
        f"{plan.listing.name}: {problem}, twice; it was deleted. Something between here and the "
        "hub changes it (a proxy, a mirror in HF_ENDPOINT), or the disk does"
    )


def _transfer(plan: Plan, file: HubFile, part: Path, watcher: Watcher) -> str:
    """Fetch what is missing of a file; its sum. Raises Misled and CheckpointError."""
    part.parent.mkdir(parents=True, exist_ok=True)
    tries = Tries(watcher.note, reached=True)
    with part.open("ab") as out:
        have = part.stat().st_size
        if have > file.size:
            out.truncate(have := 0)
        if have > _LONG_CHECK_BYTES:
            watcher.note(f"{file.name}: checking the {decimal(have)} that are here")
        sum = _new_sum(file)
        with part.open("rb") as begun:
            while have and (data := begun.read(1 << 20)):
                sum.update(data)
        watcher.progress(file, have)
        while have < file.size:
            try:
                with open_file(plan.listing, file, have) as body:
                    if body.start != have:
                        watcher.note(f"{file.name}: the server cannot continue it; from the start")
                        out.truncate(have := 0)
                        sum = _new_sum(file)
                    for chunk in body.chunks:
                        chunk = chunk[: file.size - have]
                        out.write(chunk)
                        sum.update(chunk)
                        have += len(chunk)
                        tries.came(len(chunk))
                        watcher.progress(file, have)
                        if have == file.size:
                            break
                    else:
                        raise Interrupted("the server ended before the file did")
            except Interrupted as e:
                out.flush()
                try:
                    tries.wait(e)
                except CheckpointError as enough:
                    raise CheckpointError(f"{file.name}: {enough}; {_GO_ON}") from e
        out.flush()
        os.fsync(out.fileno())  # a final name after a power cut means whole
    return sum.hexdigest()


def _new_sum(file: HubFile) -> hashlib._Hash:
    # git's name of a blob is the sha1 of its length and content
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)


def _sum(file: HubFile, data: bytes) -> str:
    sum = _new_sum(file)
    sum.update(data)
    return sum.hexdigest()


def _blob(folder: Path, file: HubFile) -> Path:
    return folder / "blobs" / file.etag


def _incomplete(folder: Path, file: HubFile) -> Path:
    return folder / "blobs" / f"{file.etag}.incomplete"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextlib.contextmanager
def _lock(plan: Plan, file: HubFile, watcher: Watcher) -> Iterator[None]:
    """The lock that huggingface_hub takes too; waits for whoever has it."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = plan.folder.parent / ".locks" / plan.folder.name / f"{file.etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=0.2))
        except Timeout:
            watcher.note(f"{file.name}: another program is fetching it; waiting for that")
            stack.enter_context(WeakFileLock(path))
        yield


def _link(plan: Plan) -> None:
    """Give all files their names in the snapshot, and only then make it the one of its revision."""
    placed: dict[str, Path] = {}
    for file in plan.files:
        target, blob = plan.snapshot / file.name, _blob(plan.folder, file)
        if _size(target) != file.size:
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(blob if blob.exists() else placed[file.etag], target)
        placed[file.etag] = target
    revision = plan.revision or "main"
    if revision == plan.listing.commit:
        return
    ref = plan.folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    temporary = ref.with_name(f"{ref.name}.{uuid4().hex[:8]}.tmp")
    temporary.write_text(plan.listing.commit, encoding="utf-8")
    temporary.replace(ref)


def _place(content: Path, target: Path) -> None:
    """A relative link as huggingface_hub makes it; where the disk knows none, a hard link, and
    where it knows none either, the content itself."""
    temporary = target.with_name(f"{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        temporary.symlink_to(os.path.relpath(content, target.parent))
    except OSError:
        try:
            temporary.hardlink_to(content)
        except OSError:
            if content.parent.name == "blobs":
                content.replace(target)
                return
            shutil.copyfile(content, temporary)
    temporary.replace(target)
