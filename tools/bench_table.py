"""What bench_peers.py measured, and the page that it makes of it. Knows no program and no clock.

Speeds are tokens a second, as median (least..most). A ratio is ours over the peer's speed, so that
more is better for us.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS, LLAMA_CPP = "ours", "llama.cpp"
MB = 10**6
# Memory of the process besides the file and the cache: interpreter, libraries, activations.
MEMORY_BESIDES_BYTES = 300 * MB
DEEP = 4096  # from here on how speed falls off counts, not the speed
MISSED = " **missed**"
NONE = "–"


@dataclass
class Row:
    """One test of one type: seconds of each round and tokens in them, by program."""

    type: str
    do: str  # "prefill" or "decode"
    tokens: int
    depth: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{'pp' if self.do == 'prefill' else 'tg'}{self.tokens} @ d{self.depth}"

    def speeds(self, program: str) -> list[float]:
        """Tokens a second of each round."""
        return [self.counts[program] / s for s in self.seconds.get(program, ())]

    def speed(self, program: str) -> float | None:
        """The median of the rounds; None where there are none."""
        speeds = self.speeds(program)
        return statistics.median(speeds) if speeds else None

    def ratio_of_rounds(self, peer: str) -> float | None:
        """The median of the ratios of the rounds that both have."""
        pairs = list(zip(self.speeds(OURS), self.speeds(peer), strict=False))
        return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None

    def ratio_of_medians(self, peer: str) -> float | None:
        mine, theirs = self.speed(OURS), self.speed(peer)
        return mine / theirs if mine and theirs else None


@dataclass
class Results:
    """All that was measured; `missing` says why a program has no figure for a type, and `alone` has
    what has no peer: its values of each round, and their unit."""

    command: str
    heading: str
    facts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    load_s: dict[str, dict[str, float]] = field(default_factory=dict)
    first_token_s: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finished: bool = False


class Footnotes:
    """Numbers reasons as they are first used."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def mark(self, reason: str) -> str:
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"{NONE} ({self._reasons.index(reason) + 1})"

    def lines(self) -> list[str]:
        return [f"({n}) {reason}" for n, reason in enumerate(self._reasons, 1)]


def page(results: Results) -> str:
    """The whole page, in markdown; what has not been measured yet is left away."""
    lines = [f"# {results.heading}", "", f"    {results.command}", ""]
    if not results.finished:
        lines += ["**Not finished:** the run was interrupted, or goes on.", ""]
    lines += [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [f"- {program}: {version}" for program, version in results.versions.items()]
    lines += ["", *(f"{note}\n" for note in results.notes)]
    sections = (_speed, _fall_off, _memory, _loading, _alone)
    return "\n".join(lines + [line for section in sections for line in section(results)])


def _section(title: str, head: list[str], left: int, rows: list[list[str]]) -> list[str]:
    """A table whose first `left` columns are words; nothing where it has no rows."""
    if not rows:
        return []
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["", f"## {title}", "", *(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))]


def _speed(results: Results) -> list[str]:
    notes = Footnotes()
    peers = [name for name in results.versions if name not in (OURS, LLAMA_CPP)]
    rows = []
    for row in results.rows:
        cells = [row.type, row.name]
        for program in (OURS, LLAMA_CPP):
            cells.append(_figure(row, program, results.missing, notes))
        ratio = row.ratio_of_rounds(LLAMA_CPP)
        cells += [_number(ratio), _number(row.ratio_of_medians(LLAMA_CPP))]
        cells.append(_goal(row, ratio, best_prefill(results.rows, row)))
        for program in peers:
            figure = _figure(row, program, results.missing, notes)
            against = row.ratio_of_rounds(program)
            slower = MISSED if against is not None and against < 1 else ""
            cells.append(f"{figure}: {against:.2f}{slower}" if against is not None else figure)
        rows.append(cells)
    head = ["type", "test", OURS, LLAMA_CPP, "ratio", "of medians", "goal"]
    head += [f"{program}: ratio" for program in peers]
    table = _section("Speed", head, 2, rows)
    if not table:
        return []
    explained = [
        "",
        "ppN: a prompt of N tokens; tgN: N tokens one by one; @ dD: with D in the cache already.",
        "Tokens/s, median (least..most). Ratios are ours over the peer's speed: the median of the "
        "rounds' ratios, and of medians the ratio of the medians. A prompt's goal is llama.cpp's "
        f"best type. The goal beside the other peers is 1; from depth {DEEP} on see below.",
    ]
    return table + explained + [line for note in notes.lines() for line in ("", note)]


def _figure(
    row: Row, program: str, missing: Mapping[str, Mapping[str, str]], notes: Footnotes
) -> str:
    speeds = row.speeds(program)
    if not speeds:
        return notes.mark(missing.get(row.type, {}).get(program, f"{program}: not at this depth"))
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f}..{max(speeds):.1f})"


def best_prefill(rows: list[Row], like: Row) -> tuple[float, str] | None:
    """llama.cpp's greatest speed in this test, and the type it has that with."""
    speeds = [
        (speed, row.type)
        for row in rows
        if (row.do, row.tokens, row.depth) == (like.do, like.tokens, like.depth)
        and (speed := row.speed(LLAMA_CPP)) is not None
    ]
    return max(speeds, default=None)


def _goal(row: Row, ratio: float | None, best: tuple[float, str] | None) -> str:
    mine = row.speed(OURS)
    if mine is None or ratio is None or best is None:
        return NONE
    if row.do == "prefill":
        part = mine / best[0]
        return f"{best[0]:.1f} ({best[1]}): {part:.2f}{'' if part >= 1 else MISSED}"
    if row.depth >= DEEP:
        return NONE
    return "1.00" + ("" if ratio >= 1 else MISSED)


def _fall_off(results: Results) -> list[str]:
    """Decoding at each depth as a part of that at the first depth."""
    decode: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.do == "decode":
            decode.setdefault(row.type, []).append(row)
    rows = []
    for type, tests in decode.items():
        for row in tests[1:]:
            mine, theirs = (_part(tests[0], row, name) for name in (OURS, LLAMA_CPP))
            if mine is not None:
                missed = MISSED if theirs is not None and mine < theirs else ""
                depths = f"d{row.depth} / d{tests[0].depth}"
                rows.append([type, depths, _number(mine) + missed, _number(theirs)])
    return _section(
        "How decoding falls off", ["type", "speed at", OURS, "goal: llama.cpp"], 2, rows
    )


def _part(first: Row, row: Row, program: str) -> float | None:
    at_first, at_depth = first.speed(program), row.speed(program)
    return at_depth / at_first if at_first and at_depth else None


def _memory(results: Results) -> list[str]:
    programs = list(results.versions)
    rows = []
    for type, peaks in results.peak_bytes.items():
        goal = results.file_bytes[type] + results.cache_bytes[type] + MEMORY_BESIDES_BYTES
        missed = MISSED if peaks.get(OURS, 0) > goal else ""
        cells = [type]
        for name in programs:
            mark = missed if name == OURS else ""
            cells.append(f"{peaks[name] / MB:,.0f}{mark}" if name in peaks else NONE)
        sizes = f"{results.file_bytes[type] / MB:,.0f} + {results.cache_bytes[type] / MB:,.0f}"
        rows.append([*cells, f"{goal / MB:,.0f} = {sizes} + {MEMORY_BESIDES_BYTES // MB}"])
    head = ["type", *programs, "goal: file + cache + 300"]
    return _section("Peak resident memory, MB", head, 1, rows)


def _loading(results: Results) -> list[str]:
    programs = list(results.versions)
    rows = []
    for type, loads in results.load_s.items():
        firsts = results.first_token_s.get(type, {})
        cells = [type]
        for name in programs:
            first = f"{firsts[name]:.2f}" if name in firsts else NONE
            cells.append(f"{loads[name]:.2f} + {first}" if name in loads else NONE)
        rows.append(cells)
    title = "Start of the process until loaded + first token after it, s, once"
    return _section(title, ["type", *programs], 1, rows)


def _alone(results: Results) -> list[str]:
    rows = []
    for what, measured in results.alone.items():
        values, unit = measured["values"], measured["unit"]
        spread = f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f}) {unit}"
        rows.append([what, spread, measured.get("goal", NONE)])
    return _section("Start-up and threads", ["", "median", "goal"], 1, rows)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
