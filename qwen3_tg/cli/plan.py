"""`qwen3 plan`: how much memory a model takes, what fits, and how long a context may be."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_tg import device as devices
from qwen3_tg import usage
from qwen3_tg.cli import terminal
from qwen3_tg.cli.sizes import read_size
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import DeviceError, UsageError, check_count
from qwen3_tg.plan import (
    FORMS,
    ModelSize,
    Plan,
    Source,
    Use,
    check_form,
    find_source,
    largest_context,
    load_factor,
    make_plan,
    stored_as,
)
from qwen3_tg.speculate import check_vocabulary

CONTEXTS = (1024, 4096, 8192, 32768, 40960, 65536, 131072)
_NO_TERMINAL_COLUMNS = 100


@dataclass(frozen=True)
class Target:
    """A device to plan for. `free_bytes` is None where it is not known, `factor` is that of the
    estimate of scratch, `use` what the model is for there."""

    policy: devices.Policy
    free_bytes: int | None
    factor: float
    use: Use

    def plan(self, size: ModelSize, context: int | None) -> Plan:
        return make_plan(size, self.policy, context, self.factor, self.use)

    def holds(self, plan: Plan) -> bool | None:
        return None if self.free_bytes is None else plan.needed_bytes <= self.free_bytes

    def largest_context(self, size: ModelSize) -> int | None:
        if self.free_bytes is None:
            return None
        return largest_context(size, self.policy, self.free_bytes, self.factor, self.use)


@dataclass(frozen=True)
class Question:
    """What is asked: `sizes` by format, the contexts (None: the model's own), the devices with the
    one that would be chosen first. `has_detail`: the parts of the first one are of interest."""

    source: Source
    sizes: dict[str, ModelSize]
    contexts: list[int | None]
    targets: list[Target]
    has_detail: bool

    @property
    def is_table(self) -> bool:
        return len(self.sizes) > 1 or len(self.contexts) > 1


def plan(options: argparse.Namespace) -> None:
    """Find the model, plan it for each device, and print that."""
    forms = _read_forms(options.quant)
    contexts = _read_contexts(options.context)
    memory_bytes = read_size("--memory", options.memory, least=2**20) if options.memory else None
    check_count("--batch", options.batch, least=1)
    if options.batch and options.draft:
        raise UsageError("--draft guesses for one prompt at a time, not for --batch")
    source = find_source(options.model, bool(forms), terminal.note)
    for remark in source.notes:
        terminal.note(f"note: {remark}")
    use = Use(
        options.batch or 0, _read_draft(options.draft, source.config) if options.draft else None
    )
    targets = (
        [Target(devices.imagined(memory_bytes, options.kv_dtype), memory_bytes, 1.0, use)]
        if options.memory
        else _targets_here(options.kv_dtype, use)
    )
    name = source.form or "as stored"
    sizes = {} if forms else {name: ModelSize.of(source.config, source.weights)}
    everything = not forms and source.is_open
    for form in FORMS if everything else forms:
        sizes[form] = ModelSize.of(source.config, stored_as(source.config, form))
    if len(sizes) > 1 and not contexts:
        contexts = [n for n in CONTEXTS if n <= source.config.longest_context]
    has_detail = everything or (len(sizes) == 1 and len(contexts) <= 1)
    question = Question(source, sizes, list(contexts) or [None], targets, has_detail)
    if options.json:
        print(json.dumps(_as_json(question), indent=2))
    elif options.markdown:
        print("\n".join(_markdown(question)))
    else:
        print("\n".join(_text(question)))


def _read_forms(text: str | None) -> list[str]:
    if text is None:
        return []
    words = [word for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"--quant names no quantisation: {text!r}")
    if "all" in [word.strip().lower() for word in words]:
        return list(FORMS)
    return list(dict.fromkeys(map(check_form, words)))


def _read_contexts(text: str | None) -> list[int]:
    if text is None:
        return []
    # 1,024 is a way to write one number, and 1024,4096 two of them
    words = [text] if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text.split(",")
    numbers = [word.strip().replace(",", "").replace("_", "") for word in words]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UsageError(f"--context must be a number of tokens, or several, found {text!r}")
    return list(dict.fromkeys(map(int, numbers)))


def _read_draft(name: str, config: ModelConfig) -> ModelSize:
    """Of a model that guesses for one with this config. Raises UsageError where it cannot."""
    source = find_source(name, False, terminal.note)
    check_vocabulary(name, (config.vocab_size, source.config.vocab_size), (None, None))
    return ModelSize.of(source.config, source.weights)


def _targets_here(kv_dtype: str | None, use: Use) -> list[Target]:
    """Every working device of this machine; its scratch is measured once."""
    targets = []
    for policy in devices.working_policies(kv_dtype):
        factor = load_factor(policy)
        if factor is None:
            terminal.note(f"measuring scratch memory on {policy.device}, once")
            try:
                factor = usage.scratch_factor(policy.device)
            except DeviceError as e:
                terminal.note(f"note: {e}; the estimate of scratch is less sure")
        targets.append(Target(policy, devices.free_memory(policy.device), factor or 1.0, use))
    if not targets:
        what = f"keeps keys and values in {kv_dtype}" if kv_dtype else "works"
        terminal.note(f"note: no device {what} here (see: qwen3 devices); planned for a GPU")
        targets.append(Target(devices.imagined(kv_dtype=kv_dtype), None, 1.0, use))
    return targets


def _text(question: Question) -> list[str]:
    lines = _headline(question)
    if question.has_detail:
        lines += ["", *_detail(question)]
    if question.is_table:
        lines += ["", *_table(question)]
    return lines


def _headline(question: Question) -> list[str]:
    source, config = question.source, question.source.config
    what = f"{source.name}, from {source.where}"
    native, longest = config.with_context(None)[1], config.longest_context
    beyond = f", to {longest:,} with YaRN" if longest > native else ""
    return _wrapped(f"{what}; context {native:,}{beyond}")


def _detail(question: Question) -> list[str]:
    """What takes how much, and what fits, for the first format and context."""
    form, size = next(iter(question.sizes.items()))
    context = question.contexts[0] if len(question.contexts) == 1 else None
    target = question.targets[0]
    plan, policy = target.plan(size, context), target.policy
    rows = _rows(plan, form, target.use.batch)
    width = max(len(f"{nbytes:,}") for _, nbytes, _ in rows)
    lines = _wrapped(
        f"On {policy.device} with a context of {plan.context:,} tokens, keys and values in "
        f"{policy.kv_dtype}, in bytes:"
    )
    lines += [
        f"  {what:<17}{nbytes:>{width},}  {_human(nbytes):>9}  {remark}".rstrip()
        for what, nbytes, remark in rows
    ]
    if plan.remark:
        lines += _wrapped(f"note: {plan.remark}")
    return [*lines, "", *_verdicts(question, size, context)]


def _rows(plan: Plan, form: str, batch: int) -> list[tuple[str, int, str]]:
    """What, how many bytes, and a remark."""
    of_each = f"{batch} more caches"
    rows = [
        ("weights", plan.weights_bytes, form),
        ("cache at first", plan.first_cache_bytes, f"{plan.first_capacity:,} positions"),
        ("cache, full", plan.cache_bytes, f"{plan.capacity:,} positions"),
        ("batch at first", plan.first_batch_cache_bytes, of_each),
        ("batch, full", plan.batch_cache_bytes, of_each),
        ("rope table", plan.rope_bytes, ""),
        ("logits", plan.logits_bytes, ""),
        ("scratch at first", plan.first_scratch_bytes, "estimate"),
        ("scratch, full", plan.scratch_bytes, "estimate"),
        ("all at first", plan.first_bytes, "short texts" if batch else "a short conversation"),
        ("all, full", plan.full_bytes, f"{plan.context:,} tokens"),
        ("while it grows", plan.growing_bytes, "old and new cache are both there"),
    ]
    if draft := plan.draft:
        rows[-3:-3] = [
            ("draft at first", draft.first_bytes, "all of the model that guesses"),
            ("draft, full", draft.full_bytes, f"{draft.context:,} tokens"),
        ]
    left_out = ["while it grows"] * (not plan.growing_cache_bytes)
    left_out += ["batch at first", "batch, full"] * (not batch)
    return [row for row in rows if row[0] not in left_out]


def _verdicts(question: Question, size: ModelSize, context: int | None) -> list[str]:
    """Of each device: whether it holds the model, and how long the context may be."""
    lines = []
    for target in question.targets:
        plan, device = target.plan(size, context), target.policy.device
        if target.free_bytes is None:
            lines += _wrapped(
                f"{device}: {_human(plan.needed_bytes)} needed; unknown whether it fits, as the "
                "device does not tell how much memory it has (see --memory)"
            )
            continue
        fits = "fits" if target.holds(plan) else "does not fit"
        longest = target.largest_context(size)
        inverse = f"the largest context is {longest:,}" if longest else "no context fits"
        lines += _wrapped(
            f"{device}: {fits}: {_human(plan.needed_bytes)} needed ({target.policy.kv_dtype} keys "
            f"and values), {_human(target.free_bytes)} free; {inverse}"
        )
    return lines


def _table(question: Question) -> list[str]:
    """All formats and contexts for the first device, in GiB; in parts where it is too wide."""
    target = question.targets[0]
    header, rows = _cells(question, target)
    columns = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    parts = _split(columns, _columns())
    lines = _wrapped(
        f"On {target.policy.device}, GiB needed at most by context in tokens{_words(target.use)}, "
        f"keys and values in {target.policy.kv_dtype}:"
    )
    for part in parts:
        lines.append("")
        for row in (header, *rows):
            cells = [row[i].ljust(columns[i]) if i == 0 else row[i].rjust(columns[i]) for i in part]
            lines.append(" ".join(cells).rstrip())
    if target.free_bytes is not None:
        lines += [
            "",
            *_wrapped(f"* fits in the {_human(target.free_bytes)} of {target.policy.device}"),
        ]
    return lines


def _words(use: Use) -> str:
    batch = f", {use.batch} prompts at once" if use.batch else ""
    return f"{batch}, with a draft model" if use.draft else batch


def _cells(question: Question, target: Target) -> tuple[list[str], list[list[str]]]:
    sizes, contexts = question.sizes, question.contexts
    plans = [target.plan(next(iter(sizes.values())), context) for context in contexts]
    header = ["", "weights", *(f"{plan.context:,} " for plan in plans)]
    known = target.free_bytes is not None
    header += ["longest"] if known else []
    rows = []
    for form, size in sizes.items():
        row = [form, f"{size.weights_bytes / 2**30:,.1f}"]
        for context in contexts:
            plan = target.plan(size, context)
            mark = "*" if target.holds(plan) else " "
            row.append(f"{plan.needed_bytes / 2**30:,.1f}{mark}")
        if known:
            longest = target.largest_context(size)
            row.append(f"{longest:,}" if longest else "-")
        rows.append(row)
    return header, rows


def _markdown(question: Question) -> list[str]:
    """The table with exact bytes of the weights, for documents."""
    target = question.targets[0]
    contexts = [
        target.plan(next(iter(question.sizes.values())), n).context for n in question.contexts
    ]
    header = ["", "weights, bytes", *(f"{n:,} tokens" for n in contexts)]
    lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    for form, size in question.sizes.items():
        needed = (target.plan(size, n).needed_bytes for n in question.contexts)
        cells = [form, f"{size.weights_bytes:,}", *(_human(nbytes) for nbytes in needed)]
        lines.append(_markdown_row(cells))
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _as_json(question: Question) -> dict[str, Any]:
    source = question.source
    return {
        "model": source.name,
        "source": source.where,
        "native_context": source.config.with_context(None)[1],
        "longest_context": source.config.longest_context,
        "notes": list(source.notes),
        "devices": [_target_as_json(question, target) for target in question.targets],
    }


def _target_as_json(question: Question, target: Target) -> dict[str, Any]:
    policy = target.policy
    return {
        "device": policy.device,
        "kv_dtype": policy.kv_dtype,
        "free_bytes": target.free_bytes,
        "formats": [
            {
                "format": form,
                "weights_bytes": size.weights_bytes,
                "largest_context": target.largest_context(size),
                "plans": [_plan_as_json(target, size, n) for n in question.contexts],
            }
            for form, size in question.sizes.items()
        ],
    }


def _plan_as_json(target: Target, size: ModelSize, context: int | None) -> dict[str, Any]:
    plan = target.plan(size, context)
    parts = {key: value for key, value in vars(plan).items() if key.endswith("_bytes")}
    return {
        "context": plan.context,
        **parts,
        "first_bytes": plan.first_bytes,
        "full_bytes": plan.full_bytes,
        "draft_first_bytes": plan.draft.first_bytes if plan.draft else 0,
        "draft_full_bytes": plan.draft.full_bytes if plan.draft else 0,
        "needed_bytes": plan.needed_bytes,
        "scratch_is_estimate": True,
        "fits": target.holds(plan),
        "remark": plan.remark,
    }


def _split(widths: list[int], columns: int) -> list[list[int]]:
    """Numbers of columns that fit beside each other; the first one begins each part."""
    parts: list[list[int]] = [[0]]
    for i, width in enumerate(widths[1:], start=1):
        taken = sum(widths[j] + 1 for j in parts[-1])
        if len(parts[-1]) > 1 and taken + width > columns:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _columns(), break_long_words=False, break_on_hyphens=False)


def _columns() -> int:
    if not sys.stdout.isatty():
        return _NO_TERMINAL_COLUMNS
    return max(20, shutil.get_terminal_size().columns)


def _human(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes} B"
