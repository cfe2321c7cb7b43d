"""`qwen3 quantize MODEL OUT`: write a smaller model. stdout gets what it cost, stderr the notes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qwen3_tg.checkpoint import Checkpoint, open_checkpoint
from qwen3_tg.cli.terminal import note
from qwen3_tg.errors import UsageError
from qwen3_tg.quantize.perplexity import perplexity
from qwen3_tg.quantize.writer import Report, write_gguf

_WINDOW = 512  # tokens foretold from at most so many, as is usual for comparisons


def quantize(options: argparse.Namespace) -> None:
    """Write the file, then print sizes, errors and, with --text, perplexities."""
    checkpoint = open_checkpoint(options.model)
    ids = _read_ids(options.text, checkpoint) if options.text else []
    window = min(_WINDOW, checkpoint.config.max_position_embeddings)
    before = _perplexity(options.model, ids, window) if ids else None
    with _progress() as update:
        report = write_gguf(
            checkpoint,
            Path(options.out),
            options.type,
            name=_name(options.model),
            embeddings=options.embeddings,
            overwrite=options.force,
            on_progress=update,
        )
    for remark in report.notes:
        note(remark)
    after = _perplexity(str(report.out), ids, window) if ids else None
    if options.json:
        found = asdict(report) | {"out": str(report.out)}
        if ids:
            found["perplexity"] = {
                "before": before,
                "after": after,
                "tokens": len(ids),
                "window": window,
            }
        print(json.dumps(found, indent=2))
        return
    _print_costs(report)
    if before is not None and after is not None:
        print(
            f"perplexity {before:.3f} before, {after:.3f} after ({after / before - 1:+.2%}), "
            f"on {len(ids)} tokens in windows of {window}"
        )


def _read_ids(file: str, checkpoint: Checkpoint) -> list[int]:
    from qwen3_tg.tokenizer import Tokenizer

    if checkpoint.tokenizer is None:
        raise UsageError(f"{checkpoint.path} has no tokenizer, which --text needs")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{file}: not readable: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{file}: not valid UTF-8 at byte {e.start}") from None
    ids = Tokenizer(checkpoint.tokenizer).encode(text)
    if len(ids) < 2:
        raise UsageError(f"{file}: too short: perplexity needs at least two tokens")
    return ids


def _perplexity(model: str, ids: list[int], window: int) -> float:
    from qwen3_tg.llm import load

    return perplexity(load(model, prefix_cache_bytes=0), ids, window)


def _name(model: str) -> str:
    """What the file calls the model: the last part of what was typed."""
    path = Path(model)
    path = path.resolve() if path.exists() else path
    return path.stem if path.suffix == ".gguf" else path.name


def _print_costs(report: Report) -> None:
    print("tensor          type        weights   error")
    for cost in report.costs:
        print(f"{cost.kind:<15} {cost.type:<6} {cost.weights:>12}  {cost.error:>6.2%}")
    print(f"{'all matrices':<36}{report.error:>6.2%}")
    print(f"{report.weights} weights: ", end="")
    before, after = report.bytes_before, report.bytes_after
    print(
        f"{before / 1e9:.3f} GB before, {after / 1e9:.3f} GB after ({after / before:.1%}); "
        f"{report.bits_per_weight:.2f} bits a weight"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("quantising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("quantising")
        yield lambda done, total: progress.update(task, completed=done, total=total)
