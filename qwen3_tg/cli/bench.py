"""`qwen3 bench`: how fast a model is on this machine. stdout gets a table, JSON or CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen3_tg import __version__
from qwen3_tg.bench.bandwidth import read_bandwidth
from qwen3_tg.bench.first_token import first_token_s, load_or_make
from qwen3_tg.bench.measure import Measured, check_counts, measure, token_bytes
from qwen3_tg.bench.random_weights import random_checkpoint
from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli import terminal
from qwen3_tg.errors import UsageError
from qwen3_tg.llm import LLM


def bench(options: argparse.Namespace) -> None:
    """Measure what was asked for and print it."""
    prompts, news, depths, batches = (_counts(name, getattr(options, name)) for name in "pndb")
    needed = check_counts(prompts, news, depths, options.r, batches)
    what = _what(options, needed)
    first = None
    if options.first_token:  # before the model takes this process's memory
        terminal.note("time to the first token, cold and warm, each in a process of its own")
        first = first_token_s(what)
    with terminal.loading() as on_progress:
        llm = load_or_make(what, on_progress)
    terminal.note("bandwidth of the memory")
    bandwidth = read_bandwidth(llm.policy)
    rows = measure(llm, prompts, news, depths, options.r, terminal.note, batches)
    bandwidth = max(bandwidth, read_bandwidth(llm.policy))
    report = _report(options, llm, rows, first, bandwidth)
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.csv:
        _print_csv(report)
    else:
        _print_table(report)


def _what(options: argparse.Namespace, needed: int) -> dict[str, Any]:
    """The options of load_or_make. Raises UsageError for what does not go together."""
    if options.shape is None and options.quant is not None:
        raise UsageError("--quant is for --shape: a MODEL is measured as it is stored")
    if options.shape is not None and options.model is not None:
        raise UsageError("give a MODEL or --shape, not both")
    quant = options.quant or "bf16"
    if options.shape is not None:
        config = random_checkpoint(options.shape, quant).config
    else:
        config = open_checkpoint(options.model or "tiny").config
    context = options.context or (needed if options.shape else None)
    _, longest, _ = config.with_context(context)
    if needed > longest:
        todo = f"; --context {needed}" if needed <= config.longest_context else ""
        raise UsageError(f"{needed} tokens do not fit in the context of {longest}{todo}")
    keys = ("device", "dtype", "kv_dtype", "kernels", "threads", "shape")
    what = {key: getattr(options, key) for key in keys}
    return what | {
        "model": options.model or "tiny",
        "quant": quant,
        "context": context,
    }


def _counts(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"-{name} must be a number, or several as 0,4096; found {text!r}"
        ) from None


def _report(
    options: argparse.Namespace,
    llm: LLM,
    rows: list[Measured],
    first: tuple[float, float] | None,
    bandwidth: float,
) -> dict[str, Any]:
    weights = llm.checkpoint.weights
    return {
        "model": str(llm.checkpoint.path) if options.shape else options.model or "tiny",
        "weight_bytes": sum(weight.device_bytes for weight in weights.values()),
        "weight_bytes_per_token": token_bytes(llm.config, weights),
        "device": llm.policy.device,
        "dtype": llm.policy.dtype,
        "kv_dtype": llm.policy.kv_dtype,
        "kernels": llm.policy.kernels,
        "threads": llm.policy.threads,
        "machine": _processor(),
        "versions": {
            "qwen3_tg": __version__,
            "tinygrad": version("tinygrad"),
            "python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
        "bandwidth_bytes_per_s": bandwidth,
        "first_token_cold_s": first and first[0],
        "first_token_warm_s": first and first[1],
        "tests": [
            {
                "test": row.name,
                "kind": row.kind,
                "tokens": row.tokens,
                "depth": row.depth,
                "batch": row.batch,
                "times_one_at_a_time": statistics.median(row.gains) if row.gains else None,
                "tokens_per_s": row.median,
                "rounds_tokens_per_s": row.rounds,
                "bytes_per_token": row.bytes_per_token if row.kind == "decode" else None,
                "bytes_per_s": row.bytes_per_s if row.kind == "decode" else None,
                "of_bandwidth": row.bytes_per_s / bandwidth if row.kind == "decode" else None,
            }
            for row in rows
        ],
    }


def _print_table(report: dict[str, Any]) -> None:
    threads = f", {report['threads']} threads" if report["threads"] else ""
    how = f"{report['device']}, {report['dtype']}, {report['kernels']} kernels{threads}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{report['model']}: {report['weight_bytes']:,} bytes of weights")
    print(f"{how}; {report['machine']}; {versions}; {report['date']}\n")
    print("| test | tokens/s | least to most | bytes/token | GB/s | of the memory's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for test in report["tests"]:
        rounds = test["rounds_tokens_per_s"]
        spread = f"{min(rounds):.2f} to {max(rounds):.2f}"
        read = "| | |"
        if test["bytes_per_token"]:
            share = f"{test['of_bandwidth']:.0%}"
            read = f"{test['bytes_per_token']:,} | {test['bytes_per_s'] / 1e9:.2f} | {share} |"
        print(f"| {test['test']} | {test['tokens_per_s']:.2f} | {spread} | {read}")
    for test in report["tests"]:
        if gain := test["times_one_at_a_time"]:
            print(f"\n{test['test']}: {gain:.2f} times the tokens/s of one at a time, in turn")
    print(f"\nmemory, measured before and after: {report['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s")
    if report["first_token_cold_s"] is not None:
        cold, warm = report["first_token_cold_s"], report["first_token_warm_s"]
        print(f"first token of a new process: {cold:.1f} s cold, {warm:.1f} s warm")


def _print_csv(report: dict[str, Any]) -> None:
    """A line a test, with what holds for all of them in each."""
    common = {key: value for key, value in report.items() if key not in ("tests", "versions")}
    common |= report["versions"]
    lines = [common | test for test in report["tests"]]
    for line in lines:
        line["rounds_tokens_per_s"] = " ".join(f"{x:.3f}" for x in line["rounds_tokens_per_s"])
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown"
