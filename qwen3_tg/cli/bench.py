"""`qwen3 bench`: how fast a model is on this machine. stdout gets a table, or JSON."""

from __future__ import annotations

import argparse
import json

from qwen3_tg.bench import Measured, Speed, measure
from qwen3_tg.cli import terminal
from qwen3_tg.llm import LLM, load


def bench(options: argparse.Namespace) -> None:
    """Load the model and measure it."""
    with terminal.loading() as on_progress:
        llm = load(options.model, options.device, options.dtype, options.context, on_progress)
    found = measure(llm, options.p, options.n, options.r)
    if options.json:
        print(json.dumps(_as_json(options.model, llm, found), indent=2))
        return
    rows = [
        (f"prefill, {found.prompt_tokens} tokens", _speed(found.prefill)),
        (f"decode, {found.new_tokens} tokens", _speed(found.decode)),
        ("weights read per token", f"{found.token_bytes:,} of {found.all_bytes:,} bytes"),
        ("cache read per token", f"{found.cache_bytes:,} bytes"),
        ("read while decoding", f"{found.bytes_per_s / 1e9:.2f} GB/s"),
    ]
    print(f"{options.model} on {llm.policy.device} in {llm.policy.dtype}, {options.r} rounds")
    for what, figure in rows:
        print(f"{what:<26} {figure}")


def _speed(speed: Speed) -> str:
    low, high = min(speed.rounds), max(speed.rounds)
    return f"{speed.median:.2f} tokens/s (median; {low:.2f} to {high:.2f})"


def _as_json(model: str, llm: LLM, found: Measured) -> dict[str, object]:
    return {
        "model": model,
        "device": llm.policy.device,
        "dtype": llm.policy.dtype,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "prefill_tokens_per_s": found.prefill.rounds,
        "decode_tokens_per_s": found.decode.rounds,
        "weight_bytes_per_token": found.token_bytes,
        "weight_bytes": found.all_bytes,
        "cache_bytes_per_token": found.cache_bytes,
        "bytes_per_s": found.bytes_per_s,
    }
