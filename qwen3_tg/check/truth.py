"""What a layer should compute, and how far from it rounding may lead, from the numpy reference."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import numpy as np
import qwen3_tg_numpy
from qwen3_tg_numpy.model import MLP, Block, LayerCache, Linear
from qwen3_tg_numpy.quantised import to_float32

from qwen3_tg.check.rounding import Rounding, size

# A position whose last chosen expert is so near to the next one that rounding may swap them: its
# logits differ by less than so many typical errors.
_NEAR = 12.0


@dataclass
class Truth:
    """Of S positions in one layer. `values` by the step's bare name (q_proj; out is the block's);
    `noise` the typical error of each alone, from right inputs, and `block_noise` of the whole block
    from a right input, (S,) each. `decided`: where no near tie makes the choice of experts a matter
    of luck, (S,)."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    noise: dict[str, np.ndarray] = field(default_factory=dict)
    full_names: dict[str, str] = field(default_factory=dict)
    block_noise: np.ndarray = field(default_factory=lambda: np.zeros(0))
    decided: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


class LayerTruth:
    """One layer of the reference, computed four times over: as it is; each step from right inputs
    with an error; the block, and all blocks up to it, with an error in every step."""

    def __init__(
        self,
        reference: qwen3_tg_numpy.Reference,
        layer: int,
        rounding: Rounding,
        inner: frozenset[str],
        seed: int,
    ):
        """`inner` steps are not seen on the device: errors go through them to the next one."""
        self._inner = inner
        self._block = _decoded(reference.model.layers[layer])
        self._name = self._block.name
        self._rounding, self._random = rounding, np.random.default_rng([seed, layer])
        self._caches = [LayerCache(reference.config) for _ in range(4)]

    def __call__(self, x: np.ndarray, twin: np.ndarray, start_pos: int) -> tuple[Truth, np.ndarray]:
        """x: (S, D) the block's right input; twin: the same after rounding in all blocks before.
        Gives the truth and the twin's output."""
        truth = Truth()

        def keep(name: str, value: np.ndarray) -> np.ndarray:
            truth.full_names[self._bare(name)] = name
            truth.values[self._bare(name)] = value
            return value

        def alone(name: str, value: np.ndarray) -> np.ndarray:
            bare, right = self._bare(name), truth.values[self._bare(name)]
            if bare == "topk_ids":
                return right
            if bare in self._inner:
                return self._with_error(bare, value, start_pos)
            kept = size(bare, self._rounding.kept(bare, right))
            truth.noise[bare] = np.hypot(size(bare, _seen(bare, value - right, start_pos)), kept)
            return self._with_error(bare, right, start_pos)

        def together(name: str, value: np.ndarray) -> np.ndarray:
            bare = self._bare(name)
            if bare == "topk_ids":
                return truth.values[bare]
            return self._with_error(bare, value, start_pos)

        clean, one, block, all_ = self._caches
        out = self._block(x, clean, start_pos, keep)
        self._block(self._with_error("out", x, start_pos), one, start_pos, alone)
        rounded = self._block(self._with_error("out", x, start_pos), block, start_pos, together)
        truth.block_noise = size("out", rounded - out)
        twin = self._block(twin, all_, start_pos, together)
        if "gate" in truth.values:
            self._of_few(truth, start_pos)
        if "scores" in truth.noise and self._rounding.policy.kv_dtype == "int8":
            self._of_few_keys(truth, clean.k, start_pos)
        truth.decided = self._decided(truth)
        return truth, twin

    def _bare(self, name: str) -> str:
        return "out" if name == self._name else name.rpartition(".")[2]

    def _with_error(self, name: str, value: np.ndarray, start_pos: int) -> np.ndarray:
        error = self._rounding.used(name, value, start_pos)
        drawn = self._random.standard_normal(value.shape, dtype=np.float32)
        return np.asarray(value + drawn * error, dtype=np.float32)

    def _of_few(self, truth: Truth, start_pos: int) -> None:
        """Chance may make the error of two or eight weights small: here what it is as a rule. A
        weight is off by as much of itself as its logit is off."""
        logits, ids = truth.values["gate"], truth.values["topk_ids"]
        error = np.take_along_axis(self._rounding.used("gate", logits, start_pos), ids, 1)
        typical = size("topk_weights", truth.values["topk_weights"] * error)
        truth.noise["topk_weights"] = np.hypot(truth.noise["topk_weights"], typical)

    def _of_few_keys(self, truth: Truth, k: np.ndarray, start_pos: int) -> None:
        """The same for the scores of the first positions, of which there are few: int8 makes their
        error large. A score is a sum over a head, in which each number of the key is off. k: (T, K,
        Hd)"""
        q, error = truth.values["q_rope"], self._rounding.used("k_rope", k, 0)
        each = np.repeat(error, q.shape[1] // k.shape[1], axis=1)  # (T, H, Hd)
        variance = (q**2).transpose(1, 0, 2) @ (each**2).transpose(1, 2, 0)  # (H, S, T)
        typical = size("scores", _seen("scores", np.sqrt(variance / q.shape[-1]), start_pos))
        truth.noise["scores"] = np.hypot(truth.noise["scores"], typical)

    def _decided(self, truth: Truth) -> np.ndarray:
        if "gate" not in truth.values:
            return np.ones(len(truth.values["out"]), dtype=bool)
        ordered = np.sort(truth.values["gate"], axis=-1)[:, ::-1]
        k = truth.values["topk_ids"].shape[-1]
        if k == ordered.shape[-1]:
            return np.ones(len(ordered), dtype=bool)
        gap = ordered[:, k - 1] - ordered[:, k]
        return np.asarray(gap > _NEAR * truth.noise["gate"])


def _decoded(block: Block) -> Block:
    """The same with matrices as float32, which are used many times here; experts stay as they are,
    for of those there may be too many."""
    block, attention = copy(block), copy(block.self_attn)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, Linear(to_float32(getattr(attention, name).weight)))
    block.self_attn = attention
    if isinstance(block.mlp, MLP):
        block.mlp = copy(block.mlp)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, Linear(to_float32(getattr(block.mlp, name).weight)))
    return block


def _seen(name: str, value: np.ndarray, start_pos: int) -> np.ndarray:
    """Without the scores of keys that lie in the future, which nothing uses."""
    if name != "scores":
        return value
    _, S, T = value.shape
    return np.where(np.arange(T) <= start_pos + np.arange(S)[:, None], value, np.float32(0))


def distance(name: str, found: np.ndarray, right: np.ndarray, start_pos: int) -> np.ndarray:
    """How far a device's value is from the right one at each position; infinity for not a number.
    (S,)"""
    with np.errstate(invalid="ignore", over="ignore"):
        d = size(name, _seen(name, found - right, start_pos))
    return np.where(np.isfinite(d), d, np.inf)
