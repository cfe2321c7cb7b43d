"""`qwen3 PROMPT`: one prompt, one streamed answer. Also loads the model for `qwen3 chat`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_tg import usage
from qwen3_tg.chat import Message
from qwen3_tg.cli import terminal
from qwen3_tg.cli.arguments import read_text
from qwen3_tg.cli.explain import Explainer
from qwen3_tg.cli.structured import read_constraint
from qwen3_tg.cli.tool_files import read_tools
from qwen3_tg.errors import UnfinishedError, UsageError, check_count
from qwen3_tg.llm import LLM, load
from qwen3_tg.replay import Recording
from qwen3_tg.reply import Piece
from qwen3_tg.sampling import Sampling

if TYPE_CHECKING:
    from qwen3_tg.generate import OnStep, Step
    from qwen3_tg.loop_guard import OnNotice


def generate(options: argparse.Namespace) -> None:
    """Answer the prompt, or with --raw continue it; or do so with each line of --input."""
    if options.raw:
        for name in ("system", "thinking", "thinking_budget", "allow_special", "tools"):
            if getattr(options, name) not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} has no meaning with --raw")
    if options.input is not None:
        _check_batch(options)
        from qwen3_tg.cli import batch

        batch.run(options)
        return
    for name in ("output", "batch", "retry"):
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name} is for the prompts of --input FILE")
    check_sampling(options)
    if options.record:
        _check_record(Path(options.record), options.n)
    options.constraint = read_constraint(options)
    tools = [tool.schema for tool in read_tools(options.tools)] if options.tools else None
    prompt = read_text(options.prompt, keep_end=options.raw)
    if not prompt.strip():
        raise UsageError('the prompt is empty: qwen3 "a question", or qwen3 chat to talk')
    if options.looks_like_a_command:
        word = options.prompt[0]
        terminal.note(f"note: {word!r} is no command (see: qwen3 --help) and is sent as a prompt")
    llm = load_model(options)
    sampling = choose_sampling(options, llm)
    if options.n > 1 and sampling.temperature == 0:
        raise UsageError(
            f"--n {options.n} at temperature 0 would give one answer {options.n} times: "
            "--temperature 1 draws them"
        )
    problems: list[UnfinishedError] = []
    for number in range(options.n):
        drawn = sampling.another(number)
        if options.n > 1:
            terminal.note(f"answer {number + 1} of {options.n}, seed {drawn.seed}")
        try:
            _answer(llm, prompt, drawn, options, tools)
        except UnfinishedError as e:
            problems.append(e)
            if options.n > 1:
                terminal.note(f"error: {e}")
    if options.verbose:
        terminal.note(usage.used_report(llm))
    if options.n > 1 and problems:
        raise UnfinishedError(f"{len(problems)} of {options.n} answers are unfinished")
    if problems:
        raise problems[0]


def _check_batch(options: argparse.Namespace) -> None:
    """Refuse what is for one prompt. Raises UsageError."""
    if options.prompt:
        raise UsageError("the prompts are those of --input: leave the one on the command line away")
    for name, usual in (("n", 1), ("explain", False), ("record", None)):
        if getattr(options, name) != usual:
            raise UsageError(f"--{name} is for one prompt, not for --input")
    for name in ("speculate", "draft"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} guesses for one prompt at a time, not for --input")
    if options.prefix_cache is not None:
        raise UsageError("--prefix-cache is for conversations, not for --input")
    options.output = "-" if options.output is None else options.output
    options.batch = 8 if options.batch is None else options.batch


def _check_record(path: Path, answers: int) -> None:
    if answers > 1:
        raise UsageError(f"--record is for one answer, found --n {answers}")
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UsageError(f"--record: {path} is no file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--record: {path} cannot be written")
    if path.exists() and path.stat().st_size:
        try:
            Recording.load(path)
        except UsageError:
            raise UsageError(f"--record: {path} is no recording; name another file") from None


def _answer(
    llm: LLM,
    prompt: str,
    sampling: Sampling,
    options: argparse.Namespace,
    tools: Sequence[Mapping[str, Any]] | None,
) -> None:
    recording = Recording.of(llm, options.model, sampling) if options.record else None
    explainer = Explainer(llm.tokenizer) if options.explain else None
    watchers = [watch for watch in (recording, explainer) if watch]

    def on_step(step: Step) -> None:
        for watch in watchers:
            watch(step)

    if options.raw:
        pieces = _continue(llm, prompt, sampling, options, on_step)
    else:
        messages = with_system([{"role": "user", "content": prompt}], options)
        pieces = reply(llm, messages, sampling, options, tools, on_step)
    printer = terminal.ReplyPrinter(sampling.seed, options.verbose)
    try:
        terminal.stream(pieces, printer.show, llm)
    except KeyboardInterrupt:
        printer.finish()
        raise
    finally:
        if recording and recording.new:
            recording.save(Path(options.record))
    if printer.unanswered and not options.raw:
        raise UnfinishedError(printer.unanswered)


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
            speculate=options.speculate,
            draft=options.draft,
            prefix_cache_bytes=options.prefix_cache,
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
    check_count("--n", getattr(options, "n", None), least=1)
    check_count("--max-new-tokens", options.max_new_tokens, least=1)
    check_count("--context", options.context, least=1)
    check_count("--threads", options.threads, least=1)
    check_count("--thinking-budget", options.thinking_budget, least=0)
    if options.thinking_budget is not None and options.thinking == "off":
        raise UsageError("--thinking-budget has no meaning with --thinking off")


def choose_sampling(options: argparse.Namespace, llm: LLM) -> Sampling:
    """What was asked for on top of the advice for this mode. Warns of what Qwen warns of."""
    chosen, raw = sampling_of(options, llm), getattr(options, "raw", False)
    thinking = raw or options.thinking != "off"
    advised = llm.default_sampling(thinking=thinking).temperature
    if chosen.temperature == 0 < advised and thinking and not raw and llm.can_think:
        terminal.note(
            "note: at temperature 0 thinking may repeat itself without end; Qwen advises against it"
        )
    return chosen


def sampling_of(options: argparse.Namespace, llm: LLM) -> Sampling:
    """What was asked for on top of the advice for this mode."""
    thinking = getattr(options, "raw", False) or options.thinking != "off"
    return replace(llm.default_sampling(thinking=thinking), **_given(options))


def with_system(messages: Sequence[Message], options: argparse.Namespace) -> list[Message]:
    return [{"role": "system", "content": options.system}] * bool(options.system) + [*messages]


def reply(
    llm: LLM,
    messages: Sequence[Message],
    sampling: Sampling,
    options: argparse.Namespace,
    tools: Sequence[Mapping[str, Any]] | None = None,
    on_step: OnStep | None = None,
    on_notice: OnNotice = terminal.notice,
) -> Iterator[Piece]:
    """The model's turn, as the options say."""
    loop = llm.chat(
        messages,
        tools=tools,
        thinking=options.thinking != "off",
        thinking_budget=options.thinking_budget,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        allow_special=options.allow_special,
        on_step=on_step,
        loop_guard=options.loop_guard,
        on_notice=on_notice,
        constraint=options.constraint,
    )
    if options.verbose:
        terminal.note(loop.plan(options.thinking != "off" and llm.can_think))
    return loop


def _continue(
    llm: LLM, prompt: str, sampling: Sampling, options: argparse.Namespace, on_step: OnStep
) -> Iterator[Piece]:
    return llm.completion(
        prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        on_step=on_step,
        loop_guard=options.loop_guard,
        on_notice=terminal.notice,
        constraint=options.constraint,
    )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = (field.name for field in fields(Sampling) if field.name != "logit_bias")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.logit_bias:
        given["logit_bias"] = dict(map(_read_bias, options.logit_bias))
    return given


def _read_bias(text: str) -> tuple[int, float]:
    id, _, bias = text.partition("=")
    try:
        return int(id), float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias must be ID=B, such as 1234=-5, found {text!r}") from None
