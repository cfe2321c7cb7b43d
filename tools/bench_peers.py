"""Compare this project with llama.cpp, transformers and tinygrad's own program on a CPU.

    python tools/bench_peers.py --shape Qwen3-0.6B --types f16,bf16,q8_0,q4_0,q4_k_m \\
        --llama-cpp PYTHON --transformers PYTHON --tinygrad PYTHON --work DIR --output docs/bench.md

The same random weights for all, made by make_random.py and `qwen3 quantize`, and the same threads.
All programs of a type are loaded at once and timed in turn, round after round, so that a noisy
machine is noisy for all of them; while one is timed the others sleep.

PYTHON is an interpreter that has the program: llama-cpp-python; transformers and torch; tinygrad
0.13.0, the last whose wheel can start its program. The last two are slow: they get fewer tokens and
rounds (--slow-tokens, --slow-rounds, --slow-depth). What a program cannot run is a dash with its
reason. The page is written anew after every test, so an interrupted run keeps what it has.

Speeds are tokens a second, as median (least..most). A ratio is ours over the peer's speed, so that
more is better for us.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

from tools.make_random import released_shapes  # noqa: E402

WORKER = Path(__file__).with_name("bench_workers.py")
TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k_m")
QUESTION = ["--thinking", "off", "--seed", "1", "What is 37 + 85?"]
FIRST_PROMPT = 16  # tokens, for the time to a first token
SLOW_WARM_UP = 80  # tokens of a prompt: three of tinygrad's chunks, after which it is captured
ROOM = 64  # tokens of context besides those that are asked for
KV_BYTES = 2  # of a value in the cache of keys and values: float16, as llama.cpp has by default
TORCH_TYPES = {"f16": "float16", "bf16": "bfloat16"}
TINYGRAD_TYPES = ("f16", "q8_0")
OURS, LLAMA_CPP = "ours", "llama.cpp"
MB = 10**6
# Memory of the process besides the file and the cache: interpreter, libraries, activations.
MEMORY_BESIDES_BYTES = 300 * MB
DEEP = 4096  # from here on how speed falls off counts, not the speed
MISSED = " **missed**"
# Programs whose threads wait for each other by spinning, as llama.cpp's do, lose much more than
# this part when others take it; what is compared then is not the programs.
MOST_OTHERS = 0.05
NONE = "-"


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
    # seconds of each round of a prompt, by type and program: all types in every round
    together: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # of each timing: seconds of all processors, and what other processes took of them
    others: list[tuple[float, float]] = field(default_factory=list)
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
    lines += [line for note in (*results.notes, *_others(results)) for line in ("", note)]
    sections = (_speed, _together, _fall_off, _memory, _loading, _alone)
    return "\n".join(lines + [line for section in sections for line in section(results)]) + "\n"


def _others(results: Results) -> list[str]:
    """How busy the machine was with something else."""
    if not sum(passed for passed, _ in results.others):
        return []
    share = sum(taken for _, taken in results.others) / sum(passed for passed, _ in results.others)
    # processor time is counted in hundredths of a second: of short timings it says nothing
    most = max((taken / passed for passed, taken in results.others if passed >= 1), default=share)
    text = (
        f"Other processes took {share:.1%} of the processors' time, at most {most:.0%} in a timing."
    )
    if share > MOST_OTHERS:
        text += " **Too busy: llama.cpp suffers more than ours from that. Not a measurement.**"
    return [text]


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
        cells.append(_goal(row, ratio, against_best(results.together, row.type)))
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
        "rounds' ratios, and of medians the ratio of the medians. A prompt's goal: the fastest of "
        "llama.cpp's types in the same round, see the next table. The goal beside the other peers "
        f"is 1; from depth {DEEP} on see below.",
    ]
    return table + explained + [line for note in notes.lines() for line in ("", note)]


def _figure(
    row: Row, program: str, missing: Mapping[str, Mapping[str, str]], notes: Footnotes
) -> str:
    speeds = row.speeds(program)
    if not speeds:
        return notes.mark(missing.get(row.type, {}).get(program, f"{program}: not at this depth"))
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f}..{max(speeds):.1f})"


def against_best(together: Mapping[str, Mapping[str, list[float]]], type: str) -> float | None:
    """Our speed with a prompt over that of llama.cpp's fastest type in the same round, the median
    of the rounds."""
    theirs = [seconds[LLAMA_CPP] for seconds in together.values() if LLAMA_CPP in seconds]
    if type not in together or not theirs:
        return None
    best = [min(round_) for round_ in zip(*theirs, strict=True)]
    pairs = zip(best, together[type][OURS], strict=True)
    return statistics.median(their / mine for their, mine in pairs)


def _goal(row: Row, ratio: float | None, best: float | None) -> str:
    if row.do == "prefill":
        return NONE if best is None else f"best type: {best:.2f}{'' if best >= 1 else MISSED}"
    if ratio is None or row.depth >= DEEP:
        return NONE
    return "1.00" + ("" if ratio >= 1 else MISSED)


def _together(results: Results) -> list[str]:
    """The machine's own speed changes from minute to minute: only what was timed in the same round
    can be compared with another type."""
    tokens = next((row.tokens for row in results.rows if row.do == "prefill"), 0)
    rows = []
    for type, seconds in results.together.items():
        best = against_best(results.together, type)
        speeds = [
            f"{tokens / statistics.median(seconds[name]):.1f}" if name in seconds else NONE
            for name in (OURS, LLAMA_CPP)
        ]
        rows.append([type, *speeds, _number(best) + (MISSED if best and best < 1 else "")])
    head = ["type", OURS, LLAMA_CPP, "ours over the fastest type of llama.cpp"]
    return _section(f"Prompts of {tokens}, all types in every round", head, 1, rows)


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


class WorkerError(Exception):
    """A program ended; the message is its last line."""


@dataclass(frozen=True)
class Program:
    """One of those that are compared, and the interpreter that has it."""

    name: str
    python: str
    slow: bool = False

    def why_not(self, type: str) -> str | None:
        """Why it cannot run a type; None where it can."""
        if self.name == "transformers" and type not in TORCH_TYPES:
            return "transformers: timed on the unquantised checkpoint alone"
        if self.name == "tinygrad" and type not in TINYGRAD_TYPES:
            return f"tinygrad: timed with {' and '.join(TINYGRAD_TYPES)} alone"
        return None


class Worker:
    """A program in a process of its own, which sleeps until it is asked. `load_s`: from the start
    of the process until the model is loaded."""

    def __init__(
        self,
        program: Program,
        model: Path,
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ):
        self._name, self._log = program.name, log
        command = [program.python, str(WORKER), program.name, str(model)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        began = time.perf_counter()
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(program.name) | dict(env or {}),
            )
        try:
            loaded = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - began
        self.version: str = loaded["version"]
        self.peak_bytes: int = loaded["peak_bytes"]

    def ask(self, do: str, tokens: int, depth: int = 0) -> float:
        """Seconds of "prefill" or "decode"; raises WorkerError."""
        assert self._process.stdin
        question = json.dumps({"do": do, "tokens": tokens, "depth": depth})
        with contextlib.suppress(BrokenPipeError):  # it has ended; the answer says why
            print(question, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"])

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let it end, as it does when its input ends; waits."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise WorkerError(f"{self._name} ended with code {code}: {said[-1] if said else ''}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Bench:
    """One run: what is measured with which options, and the results so far. The first program is
    ours, the second llama.cpp."""

    def __init__(self, options: argparse.Namespace, results: Results, programs: list[Program]):
        self.options, self.results, self.programs = options, results, programs
        self.ours = programs[0]
        self._config = released_shapes()[options.shape]
        if options.layers is not None:
            self._config = self._config | {"num_hidden_layers": options.layers}
        self._done, self._began = 0, time.monotonic()
        self._all = self._count()

    def write(self) -> None:
        """The page and the raw seconds as they are now; never half a file."""
        replace(self.options.output, page(self.results))
        if self.options.json:
            replace(self.options.json, json.dumps(asdict(self.results), indent=1) + "\n")

    def depths(self, type: str, program: Program | None = None) -> list[int]:
        """Those that are asked of a type, and of one program of it."""
        o = self.options
        depths: list[int] = o.depths
        most = o.slow_depth if program and program.slow else max(depths)
        deep = type in o.deep_types
        return [d for d in depths if d <= most and (deep or d < o.deep)]

    def context(self, type: str, program: Program | None = None) -> int:
        """Tokens that a type's cache must hold."""
        o = self.options
        most = [d + o.n for d in self.depths(type, program)]
        context: int = max(o.p, FIRST_PROMPT, SLOW_WARM_UP, *most) + ROOM
        return context

    def _rounds(self, program: Program) -> int:
        o = self.options
        return int(min(o.slow_rounds, o.rounds) if program.slow else o.rounds)

    def _count(self) -> int:
        """How many timings the run has, of any length."""
        o = self.options
        count: int = 5 * o.rounds + 2 * o.rounds * (
            o.threads > 1 and o.kernels != "generic"
        )  # alone
        count += 2 * o.rounds * len(o.types)  # prompts
        for type in o.types:
            for program in self.programs:
                if program.why_not(type) is None:
                    count += self._rounds(program) * (1 + len(self.depths(type, program)))
        return count

    def _say(self, what: str) -> None:
        minutes = (time.monotonic() - self._began) / 60
        left = f"{self._all - self._done} of {self._all} timings left"
        say(f"{what}; {left}, {minutes:.0f} min so far")
        self._done += 1

    def start(self, program: Program, type: str, path: Path, **more: Any) -> Worker:
        """Load a model; `more` are options of the worker and `env`."""
        o = self.options
        options: dict[str, Any] = {
            "threads": o.threads,
            "context": self.context(type, program),
            "vocab_size": self._config["vocab_size"],
        }
        if program.name == OURS:
            options["kernels"] = o.kernels
        if program.name == "transformers":
            options["dtype"] = TORCH_TYPES[type]
        log = o.work / f"{program.name}-{type}.log"
        return Worker(program, path, log, **(options | more))

    def compare(self, type: str, paths: Mapping[str, Path]) -> None:
        """All tests of one type with all programs, in turn. A peer that fails is a reason on the
        page; ours ends the run."""
        o, results = self.options, self.results
        workers: dict[str, Worker] = {}
        missing = results.missing.setdefault(type, {})
        results.file_bytes[type] = paths[type].stat().st_size
        results.cache_bytes[type] = self._cache_bytes(self.context(type))
        with ExitStack() as stack:

            def attempt(program: Program, action: Callable[..., None], *given: Any) -> bool:
                try:
                    action(program, *given)
                except WorkerError as e:
                    if program is self.ours:
                        raise
                    say(f"{type}: {e}")
                    missing[program.name] = str(e)
                    workers.pop(program.name, None)
                    return False
                return True

            def load(program: Program) -> None:
                say(f"{type}: loading {program.name}")
                path = paths["checkpoint" if program.name == "transformers" else type]
                worker = self.start(program, type, path)
                stack.callback(worker.close)
                results.versions[program.name] = worker.version
                first_s = worker.ask("prefill", FIRST_PROMPT)
                results.load_s.setdefault(type, {})[program.name] = worker.load_s
                results.first_token_s.setdefault(type, {})[program.name] = first_s
                # pages are read, kernels compiled and graphs captured before anything is timed
                worker.ask("prefill", SLOW_WARM_UP if program.slow else o.p)
                worker.ask("decode", 4)
                workers[program.name] = worker

            def once(program: Program, row: Row, count: int, name: str) -> None:
                self._say(f"{type}: {row.name} of {program.name}, {name}")
                worker = workers[program.name]
                others, began = busy_s() - worker.cpu_s(), time.perf_counter()
                seconds = worker.ask(row.do, count, row.depth)
                passed = (time.perf_counter() - began) * (os.cpu_count() or 1)
                others = busy_s() - worker.cpu_s() - others
                results.others.append((passed, max(0.0, others)))
                row.counts[program.name] = count
                row.seconds.setdefault(program.name, []).append(seconds)
                peaks = results.peak_bytes.setdefault(type, {})
                peaks[program.name] = worker.peak_bytes

            for program in self.programs:
                if reason := program.why_not(type):
                    missing[program.name] = reason
                else:
                    attempt(program, load)
            tests = [Row(type, "prefill", o.p, 0)]
            tests += [Row(type, "decode", o.n, depth) for depth in self.depths(type)]
            for row in tests:
                results.rows.append(row)
                for n in range(o.rounds):
                    for program in self.programs:
                        if (
                            program.name not in workers
                            or n >= self._rounds(program)
                            or (row.do == "decode" and row.depth not in self.depths(type, program))
                        ):
                            continue
                        slow = program.slow and row.do == "decode"
                        count = min(o.slow_tokens, o.n) if slow else row.tokens
                        name = f"round {n + 1} of {self._rounds(program)}"
                        if not attempt(program, once, row, count, name):
                            row.seconds.pop(program.name, None)  # fewer rounds than the page says
                self.write()

    def prompts(self, paths: Mapping[str, Path]) -> None:
        """A prompt in every type and both programs, round after round, all of them loaded."""
        o, missing = self.options, self.results.missing
        programs = [self.ours]
        if all(LLAMA_CPP not in missing.get(type, {}) for type in o.types):
            programs.append(self.programs[1])
        with ExitStack() as stack:
            workers = {}
            for type in o.types:
                for program in programs:
                    say(f"prompts of all types: loading {type} of {program.name}")
                    worker = self.start(program, type, paths[type])
                    stack.callback(worker.close)
                    worker.ask("prefill", o.p)
                    workers[type, program.name] = worker
            for _ in range(o.rounds):
                for (type, name), worker in workers.items():
                    self._say(f"prompts of all types: {type} of {name}")
                    seconds = worker.ask("prefill", o.p)
                    self.results.together.setdefault(type, {}).setdefault(name, []).append(seconds)
        self.write()

    def _cache_bytes(self, positions: int) -> int:
        c = self._config
        one = int(c["num_key_value_heads"]) * int(c["head_dim"]) * KV_BYTES
        return 2 * int(c["num_hidden_layers"]) * positions * one

    def alone(self, paths: Mapping[str, Path]) -> None:
        """Fresh processes, cold and warm, and one thread against more."""
        o = self.options
        type = "q8_0" if "q8_0" in o.types else o.types[0]
        self._fresh_processes(type, paths[type])
        self._embedded_model()
        if o.threads > 1 and o.kernels != "generic":
            self._threads(type, paths[type])

    def _fresh_processes(self, type: str, path: Path) -> None:
        """From the start of a process to the first token of a prompt, with nothing compiled, with
        everything compiled, and llama.cpp beside it."""
        what = f"start of a process to the first token, {path.stem}, prompt of {FIRST_PROMPT}"

        def first_token(program: Program, label: str, env: Mapping[str, str]) -> None:
            self._say(f"{what}, {label}")
            began = time.perf_counter()
            with contextlib.closing(self.start(program, type, path, env=env)) as worker:
                worker.ask("prefill", FIRST_PROMPT)
                self._add(f"{what}: {label}", time.perf_counter() - began, "s")

        for _ in range(self.options.rounds):
            with empty_cache() as env:
                first_token(self.ours, "ours, cold", env)
                first_token(self.ours, "ours, warm", env)
            if LLAMA_CPP not in self.results.missing.get(type, {}):
                first_token(self.programs[1], LLAMA_CPP, {})
        self.write()

    def _embedded_model(self) -> None:
        """One short question by the command line, as a whole process."""
        what = "one question to the embedded model, whole process"
        for _ in range(self.options.rounds):
            with empty_cache() as env:
                for label in ("cold", "warm"):
                    self._say(f"{what}, {label}")
                    began = time.perf_counter()
                    run(sys.executable, "-m", "qwen3_tg", *QUESTION, env=env)
                    self._add(f"{what}: {label}", time.perf_counter() - began, "s")
        self.write()

    def _threads(self, type: str, path: Path) -> None:
        o = self.options
        what = f"speed of a prompt of {o.p}, {path.stem}, {o.threads} threads over one"
        with ExitStack() as stack:
            workers = []
            for threads in (1, o.threads):
                workers.append(self.start(self.ours, type, path, threads=threads))
                stack.callback(workers[-1].close)
                workers[-1].ask("prefill", o.p)
            for _ in range(o.rounds):
                seconds = []
                for worker in workers:
                    self._say(what)
                    seconds.append(worker.ask("prefill", o.p))
                self._add(what, seconds[0] / seconds[1], "times")
        self.write()

    def _add(self, what: str, value: float, unit: str) -> None:
        self.results.alone.setdefault(what, {"unit": unit, "values": []})["values"].append(value)


def busy_s() -> float:
    """Processor time that all processes have used, and that the machine's host took."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def empty_cache() -> Iterator[dict[str, str]]:
    """An environment in which no kernel has been compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        yield {"XDG_CACHE_HOME": folder}


def _environment(program: str = OURS) -> dict[str, str]:
    """Ours is taken from beside this file and keeps its kernels where it would for anyone.
    tinygrad's own program needs a clang, and gets the one that ours would find."""
    env = {name: value for name, value in os.environ.items() if name not in ("CACHEDB", "DEV")}
    if program == OURS:
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    if program == "tinygrad":
        from qwen3_tg.compiler import find_compiler

        compiler = find_compiler()
        env |= {"DEV": "CPU", "CC": str(compiler.executable) if compiler else "clang"}
    return env


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def run(*command: str, env: Mapping[str, str] | None = None) -> str:
    """A program's output; raises WorkerError with its last line where it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environment() | dict(env or {}),
    )
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise WorkerError(f"{shlex.join(command[:4])} gave {done.returncode}: {last}")
    return done.stdout.strip()


def replace(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def make_models(shape: str, layers: int | None, types: list[str], folder: Path) -> dict[str, Path]:
    """The checkpoint as "checkpoint", in bfloat16, and a GGUF file a type. Made once."""
    name = shape if layers is None else f"{shape}-{layers}-layers"
    checkpoint = folder / name
    paths = {"checkpoint": checkpoint}
    if not (checkpoint / "tokenizer_config.json").exists():  # which is written last
        say(f"making {name} with random weights")
        command = [sys.executable, str(ROOT / "tools" / "make_random.py"), "--shape", shape]
        command += [] if layers is None else ["--layers", str(layers)]
        run(*command, "--out", str(checkpoint))
    for type in types:
        paths[type] = folder / f"{name}-{type}.gguf"
        if not paths[type].exists():
            say(f"quantising it to {type}")
            files = str(checkpoint), str(paths[type])
            run(sys.executable, "-m", "qwen3_tg", "quantize", *files, "--type", type)
    return paths


def describe_machine() -> dict[str, str]:
    """Where and from what this runs; for Linux."""
    from qwen3_tg.compiler import find_compiler

    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in cpu if line.startswith("model name")]
    kib = Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]
    changes = run("git", "status", "--porcelain", "--untracked-files=no")
    compiler = find_compiler()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": run("git", "rev-parse", "HEAD") + (", with changes" if changes else ", clean"),
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(kib) / 2**20:.1f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "compiler of ours": compiler.version if compiler else "none",
    }


def shown(arguments: list[str]) -> list[str]:
    """The command as others would give it: of this machine's places only the names, of an
    interpreter that of its environment too."""

    def short(value: str) -> str:
        if not value.startswith("/"):
            return value
        parts = Path(value).parts
        return "/".join(parts[-3:] if parts[-2] == "bin" else parts[-1:])

    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        found.append(f"{name}={short(value)}" if equals else short(argument))
    return found


def conditions(options: argparse.Namespace, programs: list[Program]) -> list[str]:
    """What the page must say of how it was measured."""
    found = [
        f"{options.threads} threads, {options.rounds} rounds in turn, random weights and ids, the "
        "same GGUF files for all that read GGUF. llama.cpp by its C functions with its own "
        "defaults. A cold process finds no compiled kernel, but the weights in the system's cache."
    ]
    if slow := [program.name for program in programs if program.slow]:
        found.append(
            f"{' and '.join(slow)}: {min(options.slow_tokens, options.n)} tokens decoded, "
            f"{min(options.slow_rounds, options.rounds)} rounds, depths to {options.slow_depth}."
        )
    if options.depths[-1] >= options.deep:
        found.append(f"Depths from {options.deep} on: {', '.join(options.deep_types)} alone.")
    if options.rounds < 5:
        found.append("**Fewer than five rounds: not a measurement.**")
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; ends with code 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="Qwen3-0.6B", choices=released_shapes())
    parser.add_argument("--layers", type=int, help="instead of the released number")
    parser.add_argument("--types", default=",".join(TYPES), help="(default: %(default)s)")
    parser.add_argument("--llama-cpp", required=True, metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--tinygrad", metavar="PYTHON")
    parser.add_argument("-p", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("-n", type=int, default=32, help="tokens decoded")
    parser.add_argument("-d", dest="depths", default="0,512,8192", help="what is in the cache then")
    parser.add_argument("-r", dest="rounds", type=int, default=5)
    parser.add_argument(
        "--deep", type=int, default=4096, help="depths from here on are for --deep-types"
    )
    parser.add_argument("--deep-types", default="q8_0", help="(default: %(default)s)")
    parser.add_argument("--slow-tokens", type=int, default=4)
    parser.add_argument("--slow-rounds", type=int, default=2)
    parser.add_argument("--slow-depth", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kernels", choices=("fast", "exact", "generic"), help="of ours")
    parser.add_argument("--work", type=Path, required=True, help="where models are made, and kept")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench.md")
    parser.add_argument("--json", type=Path, help="all seconds of all rounds")
    options = parser.parse_args(given)
    options.types, options.deep_types = options.types.split(","), options.deep_types.split(",")
    if unknown := {*options.types, *options.deep_types} - set(TYPES):
        parser.error(f"unknown types: {', '.join(sorted(unknown))}; known: {', '.join(TYPES)}")
    try:
        options.depths = sorted({int(depth) for depth in options.depths.split(",")})
    except ValueError:
        parser.error(f"-d takes numbers with commas between, found {options.depths!r}")
    if options.depths[0] < 0:
        parser.error(f"-d must not be negative, found {options.depths[0]}")
    for name in ("p", "n", "rounds", "slow_tokens", "slow_rounds", "threads", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, found {value}")
    for name in ("llama_cpp", "transformers", "tinygrad"):
        python = getattr(options, name)
        if python is not None and shutil.which(python) is None:
            parser.error(f"--{name.replace('_', '-')}: no program {python}")
    for name in ("output", "json"):
        file = getattr(options, name)
        if file is not None and not file.parent.is_dir():
            parser.error(f"--{name}: no folder {file.parent}")
    return options


def main() -> None:
    options = arguments()
    programs = [Program(OURS, sys.executable), Program(LLAMA_CPP, options.llama_cpp)]
    for name in ("transformers", "tinygrad"):
        if python := getattr(options, name):
            programs.append(Program(name, python, slow=True))
    layers = "" if options.layers is None else f", {options.layers} layers"
    try:
        results = Results(
            command=shlex.join(["python", "tools/bench_peers.py", *shown(sys.argv[1:])]),
            heading=f"{options.shape}{layers}: this project and others on a CPU",
            facts=describe_machine(),
            notes=conditions(options, programs),
        )
        options.work.mkdir(parents=True, exist_ok=True)
        paths = make_models(options.shape, options.layers, options.types, options.work)
        bench = Bench(options, results, programs)
        for type in options.types:
            bench.compare(type, paths)
        bench.prompts(paths)
        bench.alone(paths)
        results.finished = True
        bench.write()
    except WorkerError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {options.output} has what was measured")
    say(f"wrote {options.output}")


if __name__ == "__main__":
    main()
