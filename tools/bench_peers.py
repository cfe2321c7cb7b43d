"""Compare this project with llama.cpp, transformers and tinygrad's own program on a CPU.

    python tools/bench_peers.py --shape Qwen3-0.6B --llama-cpp PYTHON --work DIR --output FILE.md

The same random weights for all, made by make_random.py and `qwen3 quantize`; the same threads; all
programs of a type loaded at once and timed in turn, round after round, so that a noisy machine is
noisy for all of them. A ratio is the median of the ratios of each round. What a program cannot run
is left away, and goals that are missed are marked.

PYTHON is an interpreter that has the program: llama-cpp-python, transformers and torch, or tinygrad
0.13.0. The last two are slow: they get fewer tokens and rounds (--slow-tokens, --slow-rounds).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("bench_workers.py")
OURS, LLAMA_CPP = "ours", "llama.cpp"
TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k_m")
MB = 10**6
QUESTION = ["generate", "--thinking", "off", "--seed", "1", "hi"]

# One measurement: what was asked, then each round's seconds by program.
Seconds = dict[str, list[float]]


@dataclass
class Results:
    """All that was measured; `rows` by type and test ("pp512", "tg32 @ d512")."""

    machine: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, Seconds]] = field(default_factory=dict)
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)  # seconds, by what was done


class Worker:
    """A program in a process of its own, which waits until it is asked."""

    def __init__(self, program: str, python: str, model: Path, threads: int, context: int):
        numbers = ["--threads", str(threads), "--context", str(context)]
        command = [python, str(WORKER), program, str(model), *numbers]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(program),
        )
        self._program = program
        self.loaded = self._answer()

    def ask(self, tokens: int, depth: int | None) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps({"tokens": tokens, "depth": depth}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self._program} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment(program: str) -> dict[str, str]:
    """tinygrad's own program needs a clang, and gets the one that ours would find."""
    if program != "tinygrad":
        return dict(os.environ)
    from qwen3_tg.compiler import find_compiler

    compiler = find_compiler()
    return os.environ | {"DEV": "CPU", "CC": str(compiler.executable) if compiler else "clang"}


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def run(*command: str, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    return done.stdout.strip()


def make_models(shape: str, types: list[str], folder: Path) -> dict[str, Path]:
    """The checkpoint as "model", in bfloat16, and a GGUF file a type. Made once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"model": folder / shape}
    if not (paths["model"] / "config.json").exists():
        say(f"making {shape} with random weights")
        tool = str(ROOT / "tools" / "make_random.py")
        run(sys.executable, tool, "--shape", shape, "--out", str(paths["model"]))
    for type in types:
        paths[type] = folder / f"{shape}-{type}.gguf"
        if not paths[type].exists():
            say(f"quantising it to {type}")
            files = str(paths["model"]), str(paths[type])
            run(sys.executable, "-m", "qwen3_tg", "quantize", *files, "--type", type)
    return paths


def measure_type(options: argparse.Namespace, type: str, path: Path, results: Results) -> None:
    """All tests of one type with the two fast programs, alternating."""
    rows = results.rows.setdefault(type, {})
    depths = [d for d in options.depths if d < options.deep or type in options.deep_types]
    context = max(depths) + options.n + 64 if depths else 0
    context = max(context, options.p + 64)
    pythons = {OURS: sys.executable, LLAMA_CPP: options.llama_cpp}
    with ExitStack() as stack:
        workers = {}
        for program, python in pythons.items():
            say(f"{type}: loading {program}")
            workers[program] = Worker(program, python, path, options.threads, context)
            stack.callback(workers[program].close)
            results.versions[program] = workers[program].loaded["version"]
        tests = [(f"pp{options.p}", options.p, None)]
        tests += [(f"tg{options.n} @ d{depth}", options.n, depth) for depth in depths]
        for worker in workers.values():  # graphs are captured, caches filled, pages read
            worker.ask(options.p, None)
        for name, tokens, depth in tests:
            seconds = rows.setdefault(name, {program: [] for program in workers})
            for n in range(options.rounds):
                say(f"{type}: {name}, round {n + 1} of {options.rounds}")
                for program, worker in workers.items():
                    answer = worker.ask(tokens, depth)
                    seconds[program].append(answer["seconds"])
                    results.peak_bytes.setdefault(type, {})[program] = answer["peak_bytes"]
    results.file_bytes[type] = path.stat().st_size
    results.cache_bytes[type] = cache_of(path, context)


def cache_of(path: Path, context: int) -> int:
    """Bytes of keys and values in float16 for a context."""
    from qwen3_tg.checkpoint import open_checkpoint
    from qwen3_tg.kv_sizes import cache_bytes

    return cache_bytes(open_checkpoint(str(path)).config, context, 2)


def measure_slow(options: argparse.Namespace, paths: dict[str, Path], results: Results) -> None:
    """transformers on the bfloat16 checkpoint and tinygrad's program on GGUF files, each beside
    ours on the same weights."""
    jobs = [("transformers", options.transformers, "bf16", paths["model"])]
    jobs += [("tinygrad", options.tinygrad, type, paths[type]) for type in ("f16", "q8_0")]
    for program, python, type, path in jobs:
        if python is None or type not in options.types:
            continue
        say(f"{type}: loading {program}")
        with ExitStack() as stack:
            workers = {}
            for name, interpreter, model in (
                (OURS, sys.executable, paths[type]),
                (program, python, path),
            ):
                workers[name] = Worker(name, interpreter, model, options.threads, options.p + 64)
                stack.callback(workers[name].close)
            results.versions[program] = workers[program].loaded["version"]
            rows = results.rows.setdefault(f"{type}, {program}", {})
            tests = [
                (f"pp{options.p}", options.p, None),
                (f"tg{options.slow_tokens} @ d0", options.slow_tokens, 0),
            ]
            for name, tokens, depth in tests:
                for worker in workers.values():
                    worker.ask(tokens, depth)  # its kernels are compiled
                seconds = rows.setdefault(name, {program: [] for program in workers})
                for n in range(options.slow_rounds):
                    say(f"{type}: {name} with {program}, round {n + 1} of {options.slow_rounds}")
                    for each, worker in workers.items():
                        seconds[each].append(worker.ask(tokens, depth)["seconds"])


@contextmanager
def empty_cache() -> Iterator[dict[str, str]]:
    """An environment in which no kernel has been compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        yield {"XDG_CACHE_HOME": folder}


def measure_alone(options: argparse.Namespace, paths: dict[str, Path], results: Results) -> None:
    """Ours by itself: fresh processes cold and warm, and one thread against two."""
    generate = [sys.executable, "-m", "qwen3_tg"]
    first = [*generate, "generate", "--raw", "--max-new-tokens", "1", "--model"]
    type = "q8_0" if "q8_0" in options.types else options.types[0]
    commands = {
        f"first token, {options.shape} {type}, whole process": [*first, str(paths[type]), "hello"],
        "the embedded model answers, whole process": [*generate, *QUESTION],
    }
    for what, command in commands.items():
        for temperature in ("cold", "warm"):
            seconds = []
            for n in range(options.rounds):
                say(f"{what}, {temperature}, {n + 1} of {options.rounds}")
                with empty_cache() as env:
                    if temperature == "warm":
                        run(*command, env=env)
                    began = time.perf_counter()
                    run(*command, env=env)
                    seconds.append(time.perf_counter() - began)
            results.alone[f"{what}, {temperature}"] = statistics.median(seconds)
    if options.threads > 1:
        ratios = []
        with ExitStack() as stack:
            workers = []
            for threads in (1, options.threads):
                worker = Worker(OURS, sys.executable, paths[type], threads, options.p + 64)
                stack.callback(worker.close)
                worker.ask(options.p, None)
                workers.append(worker)
            for n in range(options.rounds):
                say(f"one thread against {options.threads}, {n + 1} of {options.rounds}")
                one, all_ = (worker.ask(options.p, None)["seconds"] for worker in workers)
                ratios.append(one / all_)
        results.alone[f"one thread against {options.threads}"] = statistics.median(ratios)


def table(options: argparse.Namespace, results: Results, command: str) -> str:
    """The whole page, in markdown."""
    lines = [f"## {options.shape}", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in results.machine.items()]
    lines += [f"- {program}: {version}" for program, version in results.versions.items()]
    lines += [
        f"- {options.threads} threads, {options.rounds} rounds, tokens/s as median (least to most)",
        "",
    ]
    lines += [
        "| type | test | ours | peer | ratio | goal |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for type, rows in results.rows.items():
        for test, seconds in rows.items():
            lines.append(row(type, test, seconds, results.rows))
    lines += ["", "| type | falls off at | ours | llama.cpp |", "| --- | --- | ---: | ---: |"]
    for type, rows in results.rows.items():
        lines += fall_off(type, rows)
    lines += ["", "| type | peak memory, ours | weights + cache + 300 MB | llama.cpp |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for type, peaks in results.peak_bytes.items():
        goal = results.file_bytes[type] + results.cache_bytes[type] + 300 * MB
        mark = "" if peaks[OURS] <= goal else " (missed)"
        ours, theirs = peaks[OURS] / MB, peaks[LLAMA_CPP] / MB
        lines.append(f"| {type} | {ours:,.0f} MB{mark} | {goal / MB:,.0f} MB | {theirs:,.0f} MB |")
    lines += ["", "| ours alone | |", "| --- | ---: |"]
    for what, value in results.alone.items():
        lines.append(f"| {what} | {value:.2f} {'x' if what.startswith('one thread') else 's'} |")
    return "\n".join(lines) + "\n"


def row(type: str, test: str, seconds: Seconds, rows: Mapping[str, Mapping[str, Seconds]]) -> str:
    """Ours against the peer that was timed with it. A prompt's goal is the best of llama.cpp's
    types."""
    tokens = int(test.removeprefix("pp").removeprefix("tg").split()[0])
    peer = next(program for program in seconds if program != OURS)
    ratios = [theirs / mine for mine, theirs in zip(seconds[OURS], seconds[peer], strict=True)]
    ratio = statistics.median(ratios)
    goal, mark = "", ""
    if peer == LLAMA_CPP and test.startswith("pp"):
        best = max(
            tokens / statistics.median(other[test][LLAMA_CPP])
            for other in rows.values()
            if LLAMA_CPP in other.get(test, {})
        )
        mine = tokens / statistics.median(seconds[OURS])
        goal = f"1.0 of the best, {best:.0f}: {mine / best:.2f}"
        mark = "" if mine >= best else " **missed**"
    elif peer == LLAMA_CPP and not test.endswith("d8192"):
        goal, mark = "1.0", "" if ratio >= 1 else " **missed**"
    figures = " | ".join(speed(tokens, seconds[program]) for program in (OURS, peer))
    return f"| {type} | {test} | {figures} | {ratio:.2f} | {goal}{mark} |"


def speed(tokens: int, seconds: list[float]) -> str:
    low, high = tokens / max(seconds), tokens / min(seconds)
    return f"{tokens / statistics.median(seconds):.1f} ({low:.1f} to {high:.1f})"


def fall_off(type: str, rows: Mapping[str, Seconds]) -> list[str]:
    """Decoding at each depth as a part of that at depth 0."""
    decode = {test: seconds for test, seconds in rows.items() if test.startswith("tg")}
    lines = []
    for test, seconds in list(decode.items())[1:]:
        parts = []
        for program in (OURS, LLAMA_CPP):
            at_0 = statistics.median(next(iter(decode.values()))[program])
            parts.append(at_0 / statistics.median(seconds[program]))
        mark = "" if parts[0] >= parts[1] else " **missed**"
        depth = test.partition("@ d")[2]
        lines.append(f"| {type} | {depth} | {parts[0]:.2f}{mark} | {parts[1]:.2f} |")
    return lines


def describe_machine() -> dict[str, str]:
    from qwen3_tg.compiler import find_compiler

    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    dirty = " with changes" if run("git", "status", "--porcelain", "-uno") else ""
    compiler = find_compiler()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": run("git", "rev-parse", "--short", "HEAD") + dirty,
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "compiler of ours": compiler.version if compiler else "none",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="Qwen3-0.6B")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--llama-cpp", required=True, metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--tinygrad", metavar="PYTHON")
    parser.add_argument("-p", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("-n", type=int, default=32, help="tokens decoded")
    parser.add_argument("-d", dest="depths", default="0,512,8192", help="what is in the cache then")
    parser.add_argument("-r", dest="rounds", type=int, default=5)
    parser.add_argument(
        "--deep", type=int, default=4096, help="depths from here are for --deep-types"
    )
    parser.add_argument("--deep-types", default="q8_0")
    parser.add_argument("--slow-tokens", type=int, default=4)
    parser.add_argument("--slow-rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, required=True, help="where models are made, and kept")
    parser.add_argument("--output", type=Path, required=True, help="the page to write, in markdown")
    parser.add_argument("--json", type=Path, help="all seconds of all rounds")
    options = parser.parse_args()
    options.types, options.deep_types = options.types.split(","), options.deep_types.split(",")
    options.depths = [int(depth) for depth in options.depths.split(",")]
    if unknown := set(options.types) - set(TYPES):
        parser.error(f"unknown types: {', '.join(sorted(unknown))}; known: {', '.join(TYPES)}")
    return options


def main() -> None:
    options = arguments()
    command = shlex.join(["python", "tools/bench_peers.py", *shown(sys.argv[1:])])
    paths = make_models(options.shape, options.types, options.work)
    results = Results(describe_machine())

    def write() -> None:
        options.output.write_text(table(options, results, command), encoding="utf-8")
        if options.json:
            options.json.write_text(json.dumps(vars(results), indent=1) + "\n", encoding="utf-8")

    for type in options.types:
        measure_type(options, type, paths[type], results)
        write()
    measure_slow(options, paths, results)
    write()
    measure_alone(options, paths, results)
    write()


def shown(arguments: list[str]) -> list[str]:
    """The command as others would give it: places of this machine are their names alone."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]


if __name__ == "__main__":
    main()
