"""The user's own weights on a device against the numpy reference, layer by layer.

Each layer is put on the device alone, and does a prompt of more than one chunk and two single
positions after it:

1. as generation runs it, in a captured graph, from the reference's input: is the block right?
2. step by step, each from the reference's inputs: which step is not?
3. from the device's own output of the layer before: how does the error grow?

An error counts as wrong when it is more than WRONG times what rounding makes (rounding.py). Where
the block is wrong and each of its steps is right alone, steps are joined one by one as the compiler
joins them, until the first wrong one.

Touches tinygrad's internals: a device's `renderer`, whose name is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import qwen3_tg_numpy
from qwen3_tg_numpy.quantised import to_float32

from qwen3_tg import device as devices
from qwen3_tg.check.fast import INNER
from qwen3_tg.check.lowered import Judge
from qwen3_tg.check.rounding import Rounding, size
from qwen3_tg.check.truth import LayerTruth, Truth, distance
from qwen3_tg.checkpoint import Checkpoint, open_checkpoint
from qwen3_tg.checkpoint.types import FLOATS, TABLE_BLOCKS, UNPACKED_AS, StoredWeight
from qwen3_tg.errors import UsageError
from qwen3_tg.shards import check_heads, split_axis
from qwen3_tg.tokenizer import Tokenizer

# How many times the typical error is too much. Right computations stay below 4 (measured: all
# types of weights, float32, float16 and bfloat16); a rotation off by one position gives thousands.
WRONG = 10.0
_SEED = 20
_MORE_THAN_A_CHUNK = 8
_SINGLE = 2  # positions after the prompt
_TEXT = (
    "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees Celsius at sea level. "
    "37 + 85 = 122. def add(a, b): return a + b\n天地玄黄 宇宙洪荒 Größe, naïve, coöperate.\n"
)


@dataclass(frozen=True)
class Step:
    """The largest error of a step in one layer, in units of the typical one. `name` is the
    checkpoint's (layers.3.self_attn.q_proj), `position` where it was, `error` and `typical` root
    mean squares there. `joined`: found only with the steps before it in the same kernels."""

    name: str
    times: float
    position: int
    error: float
    typical: float
    joined: bool = False

    @property
    def is_wrong(self) -> bool:
        return not self.times <= WRONG


@dataclass(frozen=True)
class Layer:
    """What was found of a layer (or of the embedding, or the head). `steps` in their order, from
    right inputs; `grown` the relative error of its output after all layers so far have run on the
    device alone, and `expected` that which rounding makes."""

    name: str
    steps: tuple[Step, ...]
    grown: float
    expected: float

    @property
    def wrong(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_wrong)


@dataclass
class Report:
    """`first_wrong` is the step to blame: None where everything is right."""

    model: str
    policy: devices.Policy
    renderer: str
    prompt_tokens: int
    yarn: bool
    formats: tuple[str, ...]
    layers: list[Layer] = field(default_factory=list)
    same_token: bool = False

    @property
    def first_wrong(self) -> Step | None:
        return next((step for layer in self.layers for step in layer.wrong), None)


class DeviceLayer(Protocol):
    """A layer on the device: lowered.py or fast.py."""

    def run(self, x: np.ndarray, start_pos: int) -> np.ndarray: ...
    def each_step(self, x: np.ndarray, start_pos: int, judge: Judge) -> None: ...


def check(
    model: str = "tiny",
    policy: devices.Policy | None = None,
    context: int | None = None,
    tokens: int | None = None,
    on_layer: Callable[[Layer, int, int], None] | None = None,
) -> Report:
    """Compare a model's computation with the reference's. `context` as in load(); `tokens` is the
    length of the prompt, by default somewhat more than a chunk. `on_layer` is told each layer with
    its number, from 1, and how many there are.

    Raises UsageError, CheckpointError or DeviceError where it cannot be done."""
    policy = policy or devices.choose()
    checkpoint = open_checkpoint(str(model))
    config, context, _ = checkpoint.config.with_context(context)
    checkpoint = replace(checkpoint, config=config)
    check_heads(config, len(policy.devices))
    if tokens is None:
        tokens = min(policy.prefill_chunk + _MORE_THAN_A_CHUNK, context - _SINGLE)
    if not 2 <= tokens <= context - _SINGLE:
        raise UsageError(f"--tokens must be from 2 to {context - _SINGLE}, found {tokens}")
    with devices.as_default(policy.device):
        return _Run(checkpoint, policy, tokens, on_layer).report


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: devices.Policy,
        tokens: int,
        on_layer: Callable[[Layer, int, int], None] | None,
    ):
        from tinygrad.device import Device

        from qwen3_tg.placement import place
        from qwen3_tg.rope import rope_table

        self._checkpoint, self._policy, self._config = checkpoint, policy, checkpoint.config
        self._on_layer = on_layer
        yarn = self._config.yarn
        self._reference = qwen3_tg_numpy.load(
            checkpoint.path,
            None
            if yarn is None
            else qwen3_tg_numpy.Yarn(
                *(getattr(yarn, name) for name in qwen3_tg_numpy.Yarn.__dataclass_fields__)
            ),
        )
        formats = {weight.format for weight in checkpoint.weights.values()}
        self._rounding = Rounding(
            policy,
            self._config,
            packed=bool(formats - set(FLOATS)),
            unpacked_as=UNPACKED_AS if formats & set(TABLE_BLOCKS) else None,
        )
        self._spans = _spans(tokens, policy.prefill_chunk)
        self._capacity = tokens + _SINGLE + policy.prefill_chunk
        table = rope_table(self._config, self._capacity)
        self._rope = place(table, policy.devices)
        self._kernels = devices.own_kernels(policy)
        self.report = Report(
            str(checkpoint.path),
            policy,
            type(Device[policy.devices[0]].renderer).__name__,
            tokens,
            yarn is not None,
            tuple(sorted(formats)),
        )
        self._ids = _some_ids(checkpoint, tokens + _SINGLE)
        self._embed()
        for number in range(self._config.num_hidden_layers):
            self._layer(number)
        self._head()

    def _add(self, layer: Layer) -> None:
        self.report.layers.append(layer)
        if self._on_layer:
            total = self._config.num_hidden_layers + 2
            self._on_layer(layer, len(self.report.layers), total)

    def _embed(self) -> None:
        from qwen3_tg.check import fast, lowered

        weight = self._weights("model.embed_tokens.")["model.embed_tokens.weight"]
        x = to_float32(self._reference.model.embed_tokens[self._ids])
        if self._kernels:
            found = fast.embed(weight, self._ids, self._kernels)
        else:
            found = lowered.embed(weight, self._ids, self._policy)
        typical = size("embed_tokens", self._rounding.used("embed_tokens", x, 0))
        step = _worst("embed_tokens", distance("embed_tokens", found, x, 0), typical, 0)
        self._right, self._twin, self._free = x, x, found
        self._add(Layer("embed_tokens", (step,), *self._growth()))

    def _growth(self) -> tuple[float, float]:
        """Relative error of the device's own chain and of the reference with rounding."""
        whole = float(np.linalg.norm(self._right.astype(np.float64))) or 1.0

        def relative(x: np.ndarray) -> float:
            return float(np.linalg.norm((x - self._right).astype(np.float64))) / whole

        return relative(self._free), relative(self._twin)

    def _layer(self, number: int) -> None:
        name = f"layers.{number}"
        inner = INNER if self._kernels else frozenset()
        truth_of = LayerTruth(self._reference, number, self._rounding, inner, _SEED)
        on_device = self._device_layer(number, self._weights(f"model.{name}."))
        steps: dict[str, Step] = {}
        truths: list[tuple[Truth, np.ndarray, int]] = []
        outs: list[np.ndarray] = []
        twins: list[np.ndarray] = []
        for start, end in self._spans:
            x = self._right[start:end]
            truth, twin = truth_of(x, self._twin[start:end], start)
            truths.append((truth, x, start))
            outs.append(truth.values["out"])
            twins.append(twin)
        block: Step | None = None
        for truth, x, start in truths:
            error = distance("out", on_device.run(x, start), truth.values["out"], start)
            typical = np.where(truth.decided, truth.block_noise, np.inf)
            block = _worse(block, _worst(name, error, typical, start))
        for truth, x, start in truths:
            on_device.each_step(x, start, _judge(truth, start, steps, name))
        assert block is not None
        if block.is_wrong and not any(step.is_wrong for step in steps.values()):
            block = self._joined(on_device, truths, name, block)
        free = [on_device.run(self._free[start:end], start) for start, end in self._spans]
        self._right, self._twin = np.concatenate(outs), np.concatenate(twins)
        self._free = np.concatenate(free)
        found = (*steps.values(), block)
        self._add(Layer(name, found, *self._growth()))
        del on_device
        gc.collect()
        devices.free_unused(self._policy.device)

    def _joined(
        self,
        on_device: DeviceLayer,
        truths: list[tuple[Truth, np.ndarray, int]],
        name: str,
        block: Step,
    ) -> Step:
        """The first step that is wrong in the same kernels as those before it; else the block."""
        up_to = getattr(on_device, "up_to", None)
        if up_to is None:
            return replace(block, joined=True)
        for step in truths[0][0].noise:
            for truth, x, start in truths:
                if step == "topk_ids":
                    continue
                error = distance(step, up_to(step, x, start), truth.values[step], start)
                # what comes before has errors of its own, so the scale is the value's
                scale = np.hypot(
                    truth.noise[step],
                    truth.block_noise / _size_of(truth, "out") * size(step, truth.values[step]),
                )
                worst = _worst(truth.full_names[step], error, scale, start)
                if worst.is_wrong:
                    return replace(worst, joined=True)
        return replace(block, joined=True)

    def _head(self) -> None:
        from qwen3_tg.check import fast, lowered

        config, policy = self._config, self._policy
        norm = self._weights("model.norm.")["model.norm.weight"]
        tied = config.tie_word_embeddings
        name = "model.embed_tokens." if tied else "lm_head."
        matrix = self._weights(name)[f"{name}weight"]
        last = [end - 1 for _, end in self._spans]
        values: dict[str, np.ndarray] = {}
        model = self._reference.model
        random = np.random.default_rng([_SEED, config.num_hidden_layers])

        def with_error(name: str, value: np.ndarray) -> np.ndarray:
            error = self._rounding.used(name, value, 0)
            drawn = random.standard_normal(value.shape, dtype=np.float32)
            return np.asarray(value + drawn * error, dtype=np.float32)

        x = self._right[last]
        values["norm"] = model.norm(x)
        values["lm_head"] = model.lm_head(values["norm"])
        normed = model.norm(with_error("out", x))
        noise = {
            "norm": size("norm", normed - values["norm"]),
            "lm_head": size(
                "lm_head", model.lm_head(with_error("norm", values["norm"])) - values["lm_head"]
            ),
        }
        typical = {
            name: np.hypot(noise[name], size(name, self._rounding.kept(name, values[name])))
            for name in noise
        }
        if self._kernels:
            logits = fast.head(norm, matrix, config.rms_norm_eps, x, self._kernels)
            free = fast.head(norm, matrix, config.rms_norm_eps, self._free[last], self._kernels)
            typical["lm_head"] = np.hypot(
                typical["lm_head"], size("lm_head", model.lm_head(normed) - values["lm_head"])
            )
            found = {"lm_head": logits}
        else:
            found = {
                "norm": lowered.norm(norm, config.rms_norm_eps, x, policy),
                "lm_head": lowered.head(matrix, values["norm"], policy),
            }
            free = lowered.head(
                matrix, lowered.norm(norm, config.rms_norm_eps, self._free[last], policy), policy
            )
        steps = tuple(
            _worst(name, distance(name, found[name], values[name], 0), typical[name], 0)
            for name in found
        )
        right = values["lm_head"]
        self.report.same_token = bool(free[-1].argmax() == right[-1].argmax())
        twin = model.lm_head(model.norm(self._twin[last]))
        whole = float(np.linalg.norm(right)) or 1.0
        grown = float(np.linalg.norm(free - right)) / whole
        self._add(Layer("lm_head", steps, grown, float(np.linalg.norm(twin - right)) / whole))

    def _weights(self, prefix: str) -> dict[str, Any]:
        from qwen3_tg.linear import Weight, to_device

        policy = self._policy
        shared = devices.shares_memory(policy)

        def there(name: str, weight: StoredWeight) -> Weight:
            axis = split_axis(name, weight, len(policy.devices))
            return to_device(weight, policy.device, policy.native, shared, axis)

        return {
            name: there(name, weight)
            for name, weight in self._checkpoint.weights.items()
            if name.startswith(prefix)
        }

    def _device_layer(self, number: int, weights: Mapping[str, Any]) -> DeviceLayer:
        from qwen3_tg.check.fast import FastLayer
        from qwen3_tg.check.lowered import LoweredLayer

        how = self._config, weights, number, self._rope, self._policy, self._capacity
        return FastLayer(*how, self._kernels) if self._kernels else LoweredLayer(*how)


def _spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """What is computed at once: chunks of the prompt, then single positions."""
    starts = [*range(0, tokens, chunk), *range(tokens, tokens + _SINGLE)]
    return list(zip(starts, [*starts[1:], tokens + _SINGLE], strict=True))


def _some_ids(checkpoint: Checkpoint, count: int) -> np.ndarray:
    """Ordinary text, over and over; random ids without a tokenizer."""
    size = checkpoint.config.vocab_size
    if checkpoint.tokenizer:
        ids = Tokenizer(checkpoint.tokenizer, str(checkpoint.path)).encode(_TEXT)
        ids = [id for id in ids if id < size]
        if ids:
            return np.resize(np.array(ids, dtype=np.int64), count)
    return np.random.default_rng(_SEED).integers(0, size, count)


def _judge(truth: Truth, start: int, steps: dict[str, Step], layer: str) -> Judge:
    def judge(name: str, found: np.ndarray) -> np.ndarray:
        right = truth.values[name]
        if name == "topk_ids":
            # How much less likely are those chosen than the right ones?
            logits = truth.values["gate"]
            lost = np.take_along_axis(logits, right, 1) - np.take_along_axis(
                logits, np.clip(found, 0, logits.shape[1] - 1), 1
            )
            error = np.abs(lost).max(axis=1)
            error = np.where(((found >= 0) & (found < logits.shape[1])).all(axis=1), error, np.inf)
            repeated = np.array([len(set(row)) < len(row) for row in found.tolist()])
            error, typical = np.where(repeated, np.inf, error), truth.noise["gate"]
        else:
            error, typical = distance(name, found, right, start), truth.noise[name]
        full = f"{layer}.out" if name == "out" else truth.full_names[name]
        steps[name] = _worse(steps.get(name), _worst(full, error, typical, start))
        return right

    return judge


def _worst(name: str, error: np.ndarray, typical: np.ndarray, start: int) -> Step:
    with np.errstate(invalid="ignore", divide="ignore"):
        times = np.where(error > 0, error / typical, 0.0)
    at = int(np.argmax(times))
    return Step(name, float(times[at]), start + at, float(error[at]), float(typical[at]))


def _worse(one: Step | None, other: Step) -> Step:
    return other if one is None or other.times > one.times else one


def _size_of(truth: Truth, name: str) -> np.ndarray:
    return np.asarray(np.maximum(size(name, truth.values[name]), 1e-30))
