"""`qwen3 generate --input FILE --output FILE`: many prompts, several at once."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_tg import device as devices
from qwen3_tg import usage
from qwen3_tg.batch import Answer, Batch, Request
from qwen3_tg.checkpoint import Checkpoint, fingerprint, open_checkpoint
from qwen3_tg.cli import settings, terminal
from qwen3_tg.cli.batch_files import (
    Answers,
    Line,
    has_system,
    logit_bias,
    read_lines,
    stop_strings,
)
from qwen3_tg.cli.generate import check_sampling, choose_sampling, load_model, sampling_of
from qwen3_tg.cli.structured import read_constraint
from qwen3_tg.cli.tool_files import read_tools
from qwen3_tg.errors import Qwen3Error, check_count
from qwen3_tg.llm import LLM

# Options that an answer depends on, besides settings.RANGES and those that are resolved below.
_SHAPING = ("raw", "system", "logit_bias", "stop", "loop_guard", "allow_special", "regex")
_FILES = ("tools", "json_schema", "grammar")  # of these what is in them


class _Failed(Qwen3Error):
    """Some lines have no answer."""


def run(options: argparse.Namespace) -> None:
    """Answer each line of the input that the output does not answer yet."""
    check_sampling(options)
    check_count("--batch", options.batch, least=1)
    options.constraint = read_constraint(options)
    tools = [tool.schema for tool in read_tools(options.tools)] if options.tools else None
    lines = read_lines(options.input, options.raw, _about(options))
    with Answers(options.output, lines, options.input, options.retry) as answers:
        left = [line for line in lines if line.number not in answers.done]
        done = f"{len(answers.done)} of {len(lines)} lines are answered already"
        cut = "an unfinished line at the end was taken away"
        if said := [done] * (len(left) < len(lines)) + [cut] * answers.cut_off:
            terminal.note("; ".join(said))
        try:
            if left:
                _answer(left, answers, options, tools)
        except BaseException:
            if answers.done:
                again = "" if options.output == "-" else "; the same command goes on"
                terminal.note(f"{len(answers.done)} of {len(lines)} lines are answered{again}")
            raise
        answers.sort()
        if failed := len(answers.failed):
            again = "" if options.output == "-" else "; --retry asks them again"
            has = "has" if failed == 1 else "have"
            raise _Failed(
                f'{_count(failed, "line")} of {len(lines)} {has} an "error" in the output{again}'
            )


def _about(options: argparse.Namespace) -> str:
    """All but the prompt that an answer depends on."""
    checkpoint = open_checkpoint(options.model)
    policy = devices.choose(
        options.device, options.dtype, options.kv_dtype, options.kernels, options.threads
    )
    _, context, _ = checkpoint.config.with_context(options.context)
    about = {
        "model": fingerprint(checkpoint),
        "tokenizer": _tokenizer_hash(checkpoint),
        "chat template": checkpoint.chat_template,
        "advice": repr(checkpoint.generation),
        "types": [policy.dtype, policy.kv_dtype, policy.kernels],
        "context": context,
        "thinking": options.thinking or "on",
        "options": [getattr(options, name) for name in (*_SHAPING, *settings.RANGES)],
        "files": [
            Path(file).read_text(encoding="utf-8")
            for name in _FILES
            if (file := getattr(options, name)) is not None
        ],
    }
    return json.dumps(about, sort_keys=True)


def _tokenizer_hash(checkpoint: Checkpoint) -> str | None:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return None
    text = tokenizer.encode() if isinstance(tokenizer, str) else tokenizer.read_bytes()
    return hashlib.sha256(text).hexdigest()


def _answer(
    lines: Sequence[Line],
    answers: Answers,
    options: argparse.Namespace,
    tools: Sequence[Mapping[str, Any]] | None,
) -> None:
    llm = load_model(options)
    choose_sampling(options, llm)  # warns where it should
    # one for all lines that have none of their own, each with draws of its own
    options.seed = llm.default_sampling(options.seed).seed
    batch = llm.batch(min(options.batch, len(lines)))
    asked: list[tuple[Line, int]] = []
    tokens, began = 0, time.monotonic()
    with _progress(llm, batch, len(lines)) as report:

        def requests() -> Iterator[Request]:
            for line in lines:
                if line.problem:
                    answers.write(line, {"error": _one_line(line.problem)})
                    report(len(answers.failed))
                    continue
                request = _request(line, options, llm, tools)
                asked.append((line, request.options["sampling"].seed))
                yield request

        for answer in batch.answers(requests()):
            line, seed = asked[answer.number]
            answers.write(line, _content(answer, seed))
            tokens += answer.end.thinking_tokens + answer.end.answer_tokens if answer.end else 0
            report(len(answers.failed))
    seconds = time.monotonic() - began
    busy = f", {batch.new_tokens / batch.steps:.1f} at once" if batch.steps else ""
    failed = sum(line.number in answers.failed for line in lines)
    errors = f" and {_count(failed, 'error')}" if failed else ""
    terminal.note(
        f"{_count(len(lines) - failed, 'answer')}{errors}, {tokens:,} tokens in {seconds:.1f} s: "
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s{busy}"
    )
    if options.verbose:
        terminal.note(usage.used_report(llm, batch.cache_bytes))


def _request(
    line: Line,
    options: argparse.Namespace,
    llm: LLM,
    tools: Sequence[Mapping[str, Any]] | None,
) -> Request:
    """What a line asks for, as the options say and as it says itself."""
    content = line.content
    own = argparse.Namespace(**vars(options))
    for name in (*settings.RANGES, "thinking"):
        if name in content:
            setattr(own, name, content[name])
    sampling = sampling_of(own, llm)
    if (bias := logit_bias(content)) is not None:
        sampling = replace(sampling, logit_bias=bias)
    if "seed" not in content:
        sampling = sampling.another(line.number - 1)
    own_stop = stop_strings(content)
    asked = {
        "sampling": sampling,
        "max_new_tokens": own.max_new_tokens,
        "stop": options.stop if own_stop is None else own_stop,
        "loop_guard": options.loop_guard,
        "constraint": options.constraint,
    }
    if options.raw:
        return Request(content["prompt"], asked)
    messages = content.get("messages", [{"role": "user", "content": content.get("prompt")}])
    system = content.get("system", options.system)
    if system and not has_system(messages):
        messages = [{"role": "system", "content": system}, *messages]
    return Request(
        messages,
        asked
        | {
            "tools": content.get("tools", tools),
            "thinking": own.thinking != "off",
            "thinking_budget": own.thinking_budget,
            "allow_special": options.allow_special,
        },
    )


def _content(answer: Answer, seed: int) -> dict[str, Any]:
    """What is written of it: all there is, also where it broke off."""
    content: dict[str, Any] = {"error": _one_line(answer.error)} if answer.error else {}
    if answer.end or answer.text:
        content["text"] = answer.text
    if answer.thinking:
        content["thinking"] = answer.thinking
    if answer.calls:
        content["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in answer.calls
        ]
    if end := answer.end:
        counts = "prompt_tokens", "thinking_tokens", "answer_tokens"
        content |= {"end": end.reason, **{name: getattr(end, name) for name in counts}}
        content["seed"] = seed
    return content


def _one_line(error: Qwen3Error) -> str:
    return " ".join(str(error).split())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


@contextmanager
def _progress(llm: LLM, batch: Batch, lines: int) -> Iterator[Any]:
    """On a terminal: how many are answered, how fast, and how long it will take. Gives a function
    to call after each answer, with how many failed so far."""
    if not sys.stderr.isatty():
        yield lambda failed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    making, failures, began = "", 0, time.monotonic()

    class Now(ProgressColumn):
        """Drawn again and again, also while all answers are long."""

        def render(self, task: object) -> Text:
            fast = batch.new_tokens / (time.monotonic() - began)
            speed = f"{fast:.0f} tokens/s" if batch.steps else "reading the first prompts"
            return Text(making or speed + (f", {_count(failures, 'error')}" if failures else ""))

    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), Remaining(), Now()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=lines)

        def on_kernels(done: int, total: int) -> None:
            nonlocal making
            text = f"making kernel {done} of {total}, once for this model and device"
            making = text if done < total else ""

        def report(failed: int) -> None:
            nonlocal failures
            failures = failed
            progress.advance(task)

        llm.on_kernels = on_kernels
        try:
            yield report
        finally:
            llm.on_kernels = None
