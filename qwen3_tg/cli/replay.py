"""`qwen3 replay`: go through a recorded generation on another device."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from qwen3_tg.cli import terminal
from qwen3_tg.llm import LLM, load
from qwen3_tg.replay import Difference, Recording, Replay, replay, types_of

_WRONG = 1  # exit code


def run(options: argparse.Namespace) -> int:
    """1 where the logits really differ; what cannot be compared raises."""
    recording = Recording.load(Path(options.file))
    with terminal.loading() as on_progress:
        llm = load(
            options.model or recording.model,
            options.device,
            options.dtype,
            recording.context,
            on_progress,
            kv_dtype=options.kv_dtype,
            kernels=options.kernels,
            threads=options.threads,
        )
    with terminal.progress("replaying") as on_token:
        found = replay(llm, recording, on_token)
    if options.json:
        print(json.dumps(_as_json(llm, recording, found), indent=2))
    else:
        print("\n".join(_lines(llm, recording, found)))
    return 0 if found.first_apart is None else _WRONG


def _lines(llm: LLM, recording: Recording, found: Replay) -> list[str]:
    real = sum(one.is_real for one in found.differences)
    near = len(found.differences) - real
    same = found.tokens - real - near
    lines = [
        f"recorded  {_words(recording.policy)}",
        f"replayed  {_words(types_of(llm.policy))}",
        f"logits    at most {found.apart:.2g} apart, at token {found.apart_at}; rounding makes up "
        f"to {found.rounding:.2g}",
        *(_line(llm, one) for one in found.differences),
        f"tokens    {found.tokens}: {same} the same, {near} near ties, {real} really different",
    ]
    if inserted := len(recording.new) - found.tokens:
        lines.append(f"inserted  {inserted} tokens, such as what closes the thinking: not drawn")
    if bound := len(recording.bound):
        lines.append(f"bound     {bound} tokens, by a grammar or the loop guard: logits compared")
    verdict = "the same, but for near ties" if near else "the same"
    if (first := found.first_apart) is not None:
        verdict = f"DIFFERENT: logits really differ from token {first} on; see qwen3 check"
    return [*lines, f"verdict   {verdict}"]


def _line(llm: LLM, one: Difference) -> str:
    between = "far" if one.between is None else f"{one.between:.2g}"
    kind = "REALLY DIFFERENT" if one.is_real else "near tie"
    tokens = f"recorded {_token(llm, one.recorded)}, here {_token(llm, one.other)}"
    how = f"{between} from each other, logits {one.apart:.2g} apart"
    return f"token {one.n}: {tokens}, {kind}: {how}"


def _token(llm: LLM, id: int) -> str:
    return repr(llm.tokenizer.decode([id])) if llm.tokenizer else str(id)


def _words(types: dict[str, str]) -> str:
    return "{device}, {kernels} kernels, {dtype}, cache {kv_dtype}".format(**types)


def _as_json(llm: LLM, recording: Recording, found: Replay) -> dict[str, object]:
    whole = asdict(found)
    first = found.first_real
    return {
        "recorded": recording.policy,
        "replayed": types_of(llm.policy),
        **whole,
        "first_real": first and asdict(first),
    }
