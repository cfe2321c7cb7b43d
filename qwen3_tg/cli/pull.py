"""`qwen3 pull NAME`: fetch a model from the hub. stdout gets the folder alone, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from qwen3_tg.checkpoint import locate
from qwen3_tg.cli import terminal
from qwen3_tg.errors import CheckpointError
from qwen3_tg.hub import HubFile
from qwen3_tg.pull import Plan, fetch, plan_pull

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LABEL = 32  # characters of a file's name, so that bars fit in 80 columns


def pull(options: argparse.Namespace) -> None:
    """Say what will be fetched, fetch it, and say how to use it."""
    name, _, kind = options.name.partition(":")  # as after --model
    kind = options.type or kind or None
    plan = plan_pull(name, kind, options.revision, _Lines())
    terminal.note(_summary(plan))
    try:
        with _watching(plan) as watcher:
            folder = fetch(plan, watcher)
    except KeyboardInterrupt:
        terminal.note("stopped; the same command goes on where it stopped")
        raise
    path = folder / plan.files[0].name if kind else folder
    model = _name_for_model(plan, kind, path)
    terminal.note(f"use it with: qwen3 --model {model}")
    print(json.dumps(_as_json(plan, model, path), indent=2) if options.json else path)


def _summary(plan: Plan) -> str:
    what = f"{plan.listing.name} at {plan.listing.commit[:8]}: {_count(plan.files)}"
    if not plan.missing:
        return f"{what}, {decimal(plan.total_bytes)}: all here already"
    here = plan.total_bytes - plan.fetch_bytes
    return (
        f"{what}, {decimal(plan.fetch_bytes)} to fetch"
        + (f" ({decimal(here)} of {decimal(plan.total_bytes)} here already)" if here else "")
        + f"; {decimal(plan.free_bytes)} free in {plan.folder.parent}"
    )


def _count(files: tuple[HubFile, ...]) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def _name_for_model(plan: Plan, kind: str | None, path: Path) -> str:
    """What finds it after --model: the short name where that means these files."""
    for name in (plan.listing.name, f"{plan.listing.name}:{kind}"):
        try:
            if locate(name) == path:
                return name
        except CheckpointError:
            continue
    return str(path)


def _as_json(plan: Plan, model: str, path: Path) -> dict[str, object]:
    fetched = {file.name for file in plan.missing}
    return {
        "name": plan.listing.name,
        "commit": plan.listing.commit,
        "model": model,
        "path": str(path),
        "fetched_bytes": plan.fetch_bytes,
        "files": [
            {"name": file.name, "bytes": file.size, "fetched": file.name in fetched}
            for file in plan.files
        ],
    }


class _Lines:
    """For pipes: a line a file."""

    def note(self, text: str) -> None:
        terminal.note(text)

    def progress(self, file: HubFile, done_bytes: int) -> None:
        pass

    def finished(self, file: HubFile) -> None:
        terminal.note(f"{file.name}: {decimal(file.size)}, whole and checked")


class _Bars:
    """For terminals: a bar for the file that is coming, with speed and time left, and what is left
    of all of them."""

    def __init__(self, plan: Plan, progress: Progress):
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        here = {file.name: file.size for file in plan.files}
        self._done = here | {file.name: plan.begun.get(file.name, 0) for file in plan.missing}
        self._all: TaskID | None = None
        if len(plan.missing) > 1:
            done = sum(self._done.values())
            label = f"all {_count(plan.files)}"
            self._all = progress.add_task(label, total=plan.total_bytes, completed=done)

    def note(self, text: str) -> None:
        # not through terminal.note: what passes by a live display must be printed by it
        self._progress.console.print(text, style="dim", markup=False, highlight=False)

    def progress(self, file: HubFile, done_bytes: int) -> None:
        if file.name not in self._bars:
            label = file.name if len(file.name) <= _LABEL else "…" + file.name[1 - _LABEL :]
            self._bars[file.name] = self._progress.add_task(
                label, total=file.size, completed=done_bytes
            )
        self._progress.update(self._bars[file.name], completed=done_bytes)
        self._done[file.name] = done_bytes
        if self._all is not None:
            self._progress.update(self._all, completed=sum(self._done.values()))

    def finished(self, file: HubFile) -> None:
        if file.name in self._bars:
            self._progress.update(self._bars[file.name], visible=False)
        self.note(f"{file.name}: {decimal(file.size)}, whole and checked")


@contextmanager
def _watching(plan: Plan) -> Iterator[_Lines | _Bars]:
    if not sys.stderr.isatty() or not plan.missing:
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(12),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(plan, progress)
