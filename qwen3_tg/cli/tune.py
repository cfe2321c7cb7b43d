"""`qwen3 tune`: search faster ways to lower a model's kernels on a device, once; keep them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_tg import device as devices
from qwen3_tg import tuning
from qwen3_tg.bench.first_token import load_or_make
from qwen3_tg.bench.measure import measure
from qwen3_tg.cli import terminal
from qwen3_tg.errors import UsageError, check_count

_ROUNDS, _NEW = 3, 16


def tune(options: argparse.Namespace) -> None:
    """Search, or give away or take what was found."""
    policy = devices.choose(options.device, options.dtype, options.kv_dtype, options.kernels)
    devices.check_single(policy, "tune")
    if policy.kernels != "generic":
        raise UsageError(
            "the CPU's own kernels are not lowered by tinygrad, so there is nothing to search; "
            "--kernels generic tunes the others, which are slower"
        )
    kind = tuning.Kind.of(policy.device)
    if options.export_to:
        _export(tuning.load(kind), Path(options.export_to))
    elif options.import_from:
        _import(kind, Path(options.import_from))
    else:
        _search(options, kind)


def _export(found: tuning.Tuning, path: Path) -> None:
    if not found.ways:
        raise UsageError("nothing was tuned for this device yet: qwen3 tune MODEL")
    try:
        tuning.write(path, found)
    except OSError as e:
        raise UsageError(f"--export: {path}: {e.strerror or e}") from None
    print(f"{path}: {_count(found)} for {found.kind.what} ({found.kind.renderer})")


def _import(kind: tuning.Kind, path: Path) -> None:
    found = tuning.read(path, kind)
    kept = tuning.load(kind)
    before = set(kept.ways)
    kept.ways |= found.ways
    kept.seconds |= found.seconds
    tuning.save(kept)
    print(f"{path}: {len(set(kept.ways) - before)} kernels are new; now {_count(kept)}")


def _search(options: argparse.Namespace, kind: tuning.Kind) -> None:
    check_count("--beam", options.beam, least=1)
    if not options.minutes > 0:
        raise UsageError(f"--minutes must be more than 0, found {options.minutes}")
    if options.shape is not None and options.model is not None:
        raise UsageError("give a MODEL or --shape, not both")
    if options.shape is None and options.quant is not None:
        raise UsageError("--quant is for --shape: a MODEL is tuned as it is stored")
    keys = ("device", "dtype", "kv_dtype", "kernels", "shape", "context")
    what = {key: getattr(options, key) for key in keys}
    what |= {"model": options.model or "tiny", "quant": options.quant or "bf16"}
    until = time.monotonic() + 60 * options.minutes
    terminal.note("measuring how fast it is now; its kernels are made first")
    before = _speeds(what)
    found = tuning.load(kind)
    known = set(found.ways)
    left: list[int] = []
    terminal.note("searching; Ctrl-C keeps what was found")
    with terminal.loading() as on_progress:
        llm = load_or_make(what, on_progress)
    graphs = itertools.count(1)
    llm.lower_by(lambda: _told(found, options.beam, until, left, next(graphs)))
    try:
        measure(llm, [llm.policy.prefill_chunk], [1], [0], 1)
    except KeyboardInterrupt:
        terminal.note(f"stopped; kept: {_count(found)}")
        raise
    del llm
    new = [key for key in found.ways if key not in known]
    better = [key for key in new if found.ways[key]]
    faster = f"{len(better)} became faster" if better else "none became faster"
    print(f"searched: {len(new)}, of which {faster}; now {_count(found)}")
    if left:
        print(f"left for want of time: {len(left)}; run it again to go on")
    if not better:
        return
    terminal.note("measuring again")
    for name, speed in _speeds(what).items():
        print(f"{name}: {before[name]:.2f} -> {speed:.2f} tokens/s ({speed / before[name]:.2f})")


@contextlib.contextmanager
def _told(
    found: tuning.Tuning, beam: int, until: float, left: list[int], graph: int
) -> Iterator[None]:
    began = time.monotonic()

    def on_kernel(number: int, total: int, outcome: str) -> None:
        if outcome == tuning.NO_TIME:
            left.append(number)
            return
        each = (time.monotonic() - began) / number
        terminal.note(
            f"graph {graph}, kernel {number} of {total}: {outcome}; about "
            f"{each * (total - number):.0f} s left of this graph"
        )

    with found.searching(beam, until, on_kernel):
        yield


def _speeds(what: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of a prompt and of decoding."""
    llm = load_or_make(what)
    rows = measure(llm, [llm.policy.prefill_chunk], [_NEW], [0], _ROUNDS)
    return {row.name: row.median for row in rows}


def _count(found: tuning.Tuning) -> str:
    own = sum(map(bool, found.ways.values()))
    kernels = "1 kernel is" if len(found.ways) == 1 else f"{len(found.ways)} kernels are"
    return f"{kernels} known, {own} in a way of their own"
