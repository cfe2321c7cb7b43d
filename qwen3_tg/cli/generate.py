"""`qwen3 PROMPT`: one prompt, one streamed answer. Also loads the model for `qwen3 chat`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen3_tg import usage
from qwen3_tg.chat import Message
from qwen3_tg.cli import terminal
from qwen3_tg.cli.arguments import read_text
from qwen3_tg.cli.structured import read_constraint
from qwen3_tg.cli.tool_files import read_tools
from qwen3_tg.errors import UnfinishedError, UsageError, check_count
from qwen3_tg.llm import LLM, load
from qwen3_tg.reply import End, Piece, Text
from qwen3_tg.sampling import Sampling


def generate(options: argparse.Namespace) -> None:
    """Answer the prompt, or with --raw continue it."""
    if options.raw:
        for name in ("system", "thinking", "thinking_budget", "allow_special", "tools"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} has no meaning with --raw")
    check_sampling(options)
    options.constraint = read_constraint(options)
    tools = [tool.schema for tool in read_tools(options.tools)] if options.tools else None
    prompt = read_text(options.prompt, keep_end=options.raw)
    if not prompt.strip():
        raise UsageError('the prompt is empty: qwen3 "a question", or qwen3 chat to talk')
    llm = load_model(options)
    sampling = choose_sampling(options, llm)
    pieces = _continue(llm, prompt, sampling, options) if options.raw else None
    if pieces is None:
        messages = [{"role": "user", "content": prompt}]
        pieces = reply(llm, with_system(messages, options), sampling, options, tools)
    printer = terminal.ReplyPrinter(sampling.seed, options.verbose)
    try:
        terminal.stream(pieces, printer.show, llm)
    except KeyboardInterrupt:
        printer.finish()
        raise
    if options.verbose:
        terminal.note(usage.used_report(llm))


def load_model(options: argparse.Namespace) -> LLM:
    """The model of --model and the options of where it runs, with progress."""
    began = time.perf_counter()
    with terminal.loading() as on_progress:
        llm = load(
            options.model,
            options.device,
            options.dtype,
            options.context,
            on_progress,
            kv_dtype=options.kv_dtype,
            kernels=options.kernels,
            threads=options.threads,
        )
    for remark in llm.checkpoint.notes:
        terminal.note(f"note: {remark}")
    if wishes := llm.checkpoint.generation.not_applied:
        terminal.note(f"note: generation_config.json asks for {', '.join(wishes)}: not applied")
    if options.verbose:
        terminal.note_device(llm.policy, time.perf_counter() - began)
        terminal.note(usage.loaded_report(llm))
    return llm


def check_sampling(options: argparse.Namespace) -> None:
    """Refuse impossible numbers before anything is loaded."""
    Sampling(**_given(options))
    check_count("--max-new-tokens", options.max_new_tokens, least=1)
    check_count("--context", options.context, least=1)
    check_count("--threads", options.threads, least=1)
    check_count("--thinking-budget", options.thinking_budget, least=0)
    if options.thinking_budget is not None and options.thinking == "off":
        raise UsageError("--thinking-budget has no meaning with --thinking off")


def choose_sampling(options: argparse.Namespace, llm: LLM) -> Sampling:
    """What was asked for on top of the checkpoint's advice."""
    return replace(llm.default_sampling(), **_given(options))


def with_system(messages: Sequence[Message], options: argparse.Namespace) -> list[Message]:
    return [{"role": "system", "content": options.system}] * bool(options.system) + [*messages]


def reply(
    llm: LLM,
    messages: Sequence[Message],
    sampling: Sampling,
    options: argparse.Namespace,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Piece]:
    """The model's turn, as the options say."""
    return llm.chat(
        messages,
        tools=tools,
        thinking=options.thinking != "off",
        thinking_budget=options.thinking_budget,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        allow_special=options.allow_special,
        constraint=options.constraint,
    )


def _continue(
    llm: LLM, prompt: str, sampling: Sampling, options: argparse.Namespace
) -> Iterator[Piece]:
    ends: list[End] = []
    texts = llm.generate(
        prompt, options.max_new_tokens, sampling, options.stop, ends.append, options.constraint
    )

    def pieces() -> Iterator[Piece]:
        try:
            yield from map(Text, texts)
        except UnfinishedError:  # an answer that is not of the form asked for has an end, too
            yield from ends
            raise
        yield from ends

    return pieces()


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    return {name: value for name in names if (value := getattr(options, name)) is not None}
