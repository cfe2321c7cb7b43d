"""A generation written down, and gone through again on another device, or in other types.

The recording holds every id and, where one was drawn, the largest logits it was drawn from. A
replay gives the model the recorded ids, so that one token that falls another way does not change
all that follow, and says of each that does whether the logits really differ, or whether two tokens
were so near each other that rounding decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen3_tg.atomic import replacing
from qwen3_tg.checkpoint import fingerprint
from qwen3_tg.device import Policy
from qwen3_tg.errors import CheckpointError, UsageError
from qwen3_tg.llm import LLM
from qwen3_tg.sampling import Sampling, Seen, sample

if TYPE_CHECKING:
    from qwen3_tg.generate import Step

_FORMAT, _VERSION = "qwen3_tg generation", 1
_LARGEST = 8  # logits that are kept of each step
# Half a unit in the last place of a number of size one; of int8, whose step goes by the largest of
# its head, where that is four.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-6}
# How many times rounding * sqrt(layers) * the largest logit two right computations may lie apart.
# Measured: at most 0.7 between own kernels and float32, float16 and bfloat16 by lowering, and 2.1
# with a cache in int8.
_APART = 4.0


@dataclass
class Recording:
    """`new` are ids after the prompt; `logits` has for the n-th of them, where it was drawn, the
    largest by id, the best first; `bound` are those that were drawn otherwise than `sampling` says:
    under a grammar, or by the loop guard's. `policy` says in words how they were computed."""

    model: str
    fingerprint: str
    policy: dict[str, str]
    context: int
    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    bound: set[int] = field(default_factory=set)
    logits: dict[int, dict[int, float]] = field(default_factory=dict)

    @staticmethod
    def of(llm: LLM, model: str, sampling: Sampling) -> Recording:
        types = types_of(llm.policy)
        return Recording(model, fingerprint(llm.checkpoint), types, llm.context, sampling)

    def __call__(self, step: Step) -> None:
        """To be told each step of one generation."""
        if not self.new:
            self.prompt = list(step.before[: len(step.before) - step.n])
        self.new += [*step.before[len(self.prompt) + len(self.new) :], step.id]  # with inserted ids
        largest = np.argsort(-step.logits, kind="stable")[:_LARGEST].tolist()
        ids = dict.fromkeys([*largest, step.id])
        self.logits[step.n] = {id: float(step.logits[id]) for id in ids}
        if step.allowed is not None or step.sampling != self.sampling:
            self.bound.add(step.n)

    def save(self, path: Path) -> None:
        """Whole or not at all. Raises OSError."""
        tokens = []
        for n, id in enumerate(self.new):
            best = list(self.logits.get(n, {}).items())
            gap = best[0][1] - best[1][1] if len(best) > 1 else None
            tokens.append({"id": id, "gap": gap, "logits": best} if best else {"id": id})
        settings = asdict(self.sampling)
        settings["logit_bias"] = [[id, str(bias)] for id, bias in self.sampling.logit_bias.items()]
        whole = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "computed": self.policy,
            "context": self.context,
            "sampling": settings,
            "prompt": self.prompt,
            "bound": sorted(self.bound),
            "tokens": tokens,
        }
        with replacing(path) as part:
            part.write_text(json.dumps(whole) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Recording:
        """Raises UsageError for a file that is none."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise UsageError(f"{path}: {e.strerror or e}") from None
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path}: not JSON: {e}") from None
        if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
            raise UsageError(f"{path}: not a recording of qwen3 --record")
        if raw.get("version") != _VERSION:
            raise UsageError(f"{path}: version {raw.get('version')!r}; this program reads 1")
        if not raw.get("tokens"):
            raise UsageError(f"{path}: a recording without tokens: there is nothing to replay")
        try:
            settings = dict(raw["sampling"])
            settings["logit_bias"] = {id: float(bias) for id, bias in settings["logit_bias"]}
            tokens = raw["tokens"]
            recording = Recording(
                str(raw["model"]),
                str(raw["fingerprint"]),
                {str(k): str(v) for k, v in raw["computed"].items()},
                int(raw["context"]),
                Sampling(**settings),
                [int(id) for id in raw["prompt"]],
                [int(token["id"]) for token in tokens],
                {int(n) for n in raw["bound"]},
                {
                    n: {int(id): float(logit) for id, logit in token["logits"]}
                    for n, token in enumerate(tokens)
                    if "logits" in token
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise UsageError(f"{path}: damaged: {type(e).__name__} {e}") from None
        if problem := recording.problem():
            raise UsageError(f"{path}: damaged: {problem}")
        return recording

    def problem(self) -> str:
        """What it cannot have been recorded with, in words, or ""."""
        if not self.prompt or self.context < 1:
            return "no prompt, or no context"
        if (least := min(self.all_ids)) < 0:
            return f"{least} is no token id"
        kept = [logit for best in self.logits.values() for logit in best.values()]
        if not all(map(math.isfinite, kept)):
            return "logits that are no numbers"
        if any(not best for best in self.logits.values()) or not kept:
            return "tokens that were drawn without logits"
        return ""

    @property
    def all_ids(self) -> set[int]:
        """Of all tokens in it."""
        return {*self.prompt, *self.new, *(id for best in self.logits.values() for id in best)}


@dataclass(frozen=True)
class Difference:
    """The n-th new token, for which `other` is drawn here; `between` is how far the recorded logits
    of the two lie apart (None where the other was not among the largest), `apart` how far those
    here lie from the recorded ones."""

    n: int
    recorded: int
    other: int
    between: float | None
    apart: float
    is_real: bool


@dataclass(frozen=True)
class Replay:
    """`tokens` are those that were drawn and are compared. `apart` is the largest difference of a
    logit, at the token `apart_at`; `rounding` is the most that rounding makes, and `first_apart`
    the first token whose logits are farther apart, if any, whether another one was drawn there or
    not."""

    tokens: int
    differences: tuple[Difference, ...]
    apart: float
    apart_at: int
    rounding: float
    first_apart: int | None

    @property
    def first_real(self) -> Difference | None:
        return next((found for found in self.differences if found.is_real), None)


def types_of(policy: Policy) -> dict[str, str]:
    """What a computation's rounding depends on."""
    names = ("device", "dtype", "kv_dtype", "kernels")
    return {name: str(getattr(policy, name)) for name in names}


def replay(
    llm: LLM, recording: Recording, on_token: Callable[[int, int], None] | None = None
) -> Replay:
    """Go through a recording with a model. `on_token` is told how many are done, and of how many.

    Raises CheckpointError for another model, ContextError where it does not fit, UsageError for ids
    that the model has not."""
    if (found := fingerprint(llm.checkpoint)) != recording.fingerprint:
        raise CheckpointError(
            f"the recording is of another model: {recording.model}, fingerprint "
            f"{recording.fingerprint}; this is {llm.checkpoint.path}, {found}"
        )
    if (largest := max(recording.all_ids)) >= llm.config.vocab_size:
        raise UsageError(
            f"the recording is damaged: it has the token id {largest}, and the model only "
            f"{llm.config.vocab_size} tokens"
        )
    seen, ids = Seen(recording.prompt), list(recording.prompt)
    aparts, size = dict[int, float](), 0.0
    others: list[Difference] = []
    for n, id in enumerate(recording.new):
        if kept := recording.logits.get(n):
            logits = llm.next_logits(ids)
            apart = max(abs(float(logits[k]) - value) for k, value in kept.items())
            size = max(size, float(np.abs(list(kept.values())).max()))
            aparts[n] = apart
            other = id if n in recording.bound else sample(logits, recording.sampling, n, seen)
            if other != id:
                between = abs(kept[id] - kept[other]) if other in kept else None
                others.append(Difference(n, id, other, between, apart, is_real=False))
        ids.append(id)
        seen.answer[id] += 1
        if on_token:
            on_token(n + 1, len(recording.new))
    rounding = _rounding(recording.policy, types_of(llm.policy), llm.config.num_hidden_layers, size)
    judged = tuple(replace(one, is_real=one.apart > rounding) for one in others)
    at = max(aparts, key=lambda n: aparts[n])
    first = next((n for n, apart in aparts.items() if apart > rounding), None)
    return Replay(len(aparts), judged, aparts[at], at, rounding, first)


def _rounding(one: dict[str, str], other: dict[str, str], layers: int, size: float) -> float:
    types = [types.get(name, "") for types in (one, other) for name in ("dtype", "kv_dtype")]
    coarsest = max(_ROUNDING.get(name, _ROUNDING["bfloat16"]) for name in types)
    return _APART * coarsest * math.sqrt(layers) * size
