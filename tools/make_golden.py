"""Record golden values: tiny random Qwen3 checkpoints and what transformers computes from them.

    python tools/make_golden.py --out tests/golden

Each folder is a Hugging Face directory as users have them (config.json, generation_config.json, one
safetensors file or shards) with golden.npz beside it, recorded with Qwen3ForCausalLM, eager
attention, float32, from the weights as stored:

    ids             (S,)       the prompt
    logits          (S, V)     of every position
    embed_tokens    (S, D)     and layers.{i}, norm: the hidden states
    greedy_ids      (N,)       the tokens that follow by argmax, end tokens ignored, without a cache
    greedy_gaps     (N,)       best less second-best logit at each of them

TRACED has trace.npz too: every intermediate of the first TRACE_LENGTH ids, by the names and shapes
of qwen3_tg_numpy.model.Trace. versions.json says what recorded it all.

Weights are drawn by numpy, so they do not change with torch. Norm weights lie away from one, some
are negative, and q_norm's differ from k_norm's: a model that forgets one of them cannot pass. The
final norm is scaled to logits of standard deviation one, so that one tolerance fits all.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors
import torch
import transformers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

NEW_TOKENS = 24
SMALLEST_GAP = (
    0.01  # 100 times the tolerance on logits, so that no rounding can change a greedy token
)
MOST_REPEATS = 4  # of one token in the greedy path; more would test little
TRACED, TRACE_LENGTH = "untied_bfloat16", 8


@dataclass(frozen=True)
class Case:
    """One checkpoint. Sizes by their axis letters; `style` is the transformers that config.json is
    written like; `shard_kb` splits the weights (0: one file); `seed` is where the search begins."""

    name: str
    V: int
    D: int
    F: int
    L: int
    H: int
    K: int
    Hd: int
    S: int
    tied: bool
    dtype: str
    theta: float
    style: int
    eps: float = 1e-6
    shard_kb: int = 0


CASES = (
    # H*Hd equals D here alone
    Case("tied_float32", 211, 32, 80, 2, 4, 2, 8, 40, True, "float32", 1e6, 4),
    Case("untied_bfloat16", 251, 48, 80, 2, 6, 2, 16, 44, False, "bfloat16", 1e6, 5),
    Case("multi_head_float16", 193, 40, 72, 2, 4, 4, 12, 48, True, "float16", 5e6, 5),
    Case("sharded_bfloat16", 181, 56, 88, 2, 8, 2, 12, 64, False, "bfloat16", 5e6, 4, shard_kb=48),
    Case("multi_query_float16", 163, 40, 64, 2, 3, 1, 32, 52, False, "float16", 1e6, 4, eps=1e-3),
    Case(
        "sharded_tied_float32", 149, 24, 56, 3, 6, 3, 10, 70, True, "float32", 5e6, 5, shard_kb=40
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record golden values with transformers.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the cases to")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    recorded: dict[str, Any] = {}
    for case in CASES:
        recorded[case.name] = record(case, out / case.name)
        print(case.name, json.dumps(recorded[case.name]))
    versions = {
        "command": "python tools/make_golden.py --out tests/golden",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "cases": recorded,
    }
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def record(case: Case, folder: Path) -> dict[str, Any]:
    """Write one case with the first seed that gives a clear greedy path.

    Gives what versions.json says of it."""
    for seed in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        rng = np.random.default_rng(seed)
        save(case, random_weights(case, rng), folder)
        # What users load: a change in how transformers reads these files would show here.
        model = Qwen3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = rng.integers(0, case.V, case.S)
        ids[3], ids[7], ids[11] = 0, case.V - 1, ids[10]  # both ends of the vocabulary, a repeat
        greedy_ids, gaps = greedy(model, ids)
        repeats = np.bincount(greedy_ids).max()
        ends = {case.V - 2, case.V - 1} & set(greedy_ids.tolist())
        if gaps.min() > SMALLEST_GAP and repeats <= MOST_REPEATS and not ends:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed gives a clear greedy path")
    trace = traced(model, ids)
    hidden = {k: v for k, v in trace.items() if "." not in k or k.count(".") == 1}
    logits = hidden.pop("lm_head")
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids,
        logits=logits,
        greedy_ids=greedy_ids,
        greedy_gaps=gaps,
        **hidden,
    )
    if case.name == TRACED:
        np.savez_compressed(folder / "trace.npz", **traced(model, ids[:TRACE_LENGTH]))
    return {
        "seed": seed,
        "smallest_greedy_gap": round(float(gaps.min()), 5),
        "logits_std": round(float(logits.std()), 4),
    }


def random_weights(case: Case, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its name, in the stored type."""

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.normal(0, inputs**-0.5, (outputs, inputs))

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.4, 1.8, size) * np.where(rng.random(size) < 0.15, -1, 1)

    c, w = case, {}
    w["model.embed_tokens.weight"] = matrix(c.V, c.D)
    for i in range(c.L):
        layer = f"model.layers.{i}"
        w[f"{layer}.input_layernorm.weight"] = norm(c.D)
        w[f"{layer}.self_attn.q_proj.weight"] = matrix(c.H * c.Hd, c.D)
        w[f"{layer}.self_attn.k_proj.weight"] = matrix(c.K * c.Hd, c.D)
        w[f"{layer}.self_attn.v_proj.weight"] = matrix(c.K * c.Hd, c.D)
        w[f"{layer}.self_attn.o_proj.weight"] = matrix(c.D, c.H * c.Hd)
        w[f"{layer}.self_attn.q_norm.weight"] = norm(c.Hd) * 1.5  # sharpens attention
        w[f"{layer}.self_attn.k_norm.weight"] = norm(c.Hd)
        w[f"{layer}.post_attention_layernorm.weight"] = norm(c.D)
        w[f"{layer}.mlp.gate_proj.weight"] = matrix(c.F, c.D)
        w[f"{layer}.mlp.up_proj.weight"] = matrix(c.F, c.D)
        w[f"{layer}.mlp.down_proj.weight"] = matrix(c.D, c.F) * 2
    # |norm(x)| is about sqrt(D) times the norm's size, rows of the head have length one
    final = norm(c.D)
    w["model.norm.weight"] = final / np.sqrt(np.mean(final**2))
    if not c.tied:
        w["lm_head.weight"] = matrix(c.V, c.D)
    dtype = getattr(torch, c.dtype)
    return {name: torch.from_numpy(value).to(dtype) for name, value in w.items()}


def save(case: Case, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A directory as transformers saves it; in style 4, config.json is as Qwen released it."""
    ends = [case.V - 1, case.V - 2]
    config = Qwen3Config(
        vocab_size=case.V,
        hidden_size=case.D,
        intermediate_size=case.F,
        num_hidden_layers=case.L,
        num_attention_heads=case.H,
        num_key_value_heads=case.K,
        head_dim=case.Hd,
        max_position_embeddings=128,
        rms_norm_eps=case.eps,
        tie_word_embeddings=case.tied,
        rope_parameters={"rope_type": "default", "rope_theta": case.theta},
        bos_token_id=ends[1],
        eos_token_id=ends[0],
        dtype=case.dtype,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, case.dtype))
    unset = model.load_state_dict(weights, strict=False).missing_keys
    assert unset == (["lm_head.weight"] if case.tied else []), unset
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=ends[1],
        eos_token_id=ends,
        pad_token_id=ends[1],
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    model.save_pretrained(folder, max_shard_size=f"{case.shard_kb or 10_000}KB")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # they are saved for their owner alone
    if case.style == 4:
        file = folder / "config.json"
        raw = json.loads(file.read_text())
        del raw["layer_types"], raw["pad_token_id"], raw["rope_parameters"]
        raw |= {"rope_theta": int(case.theta), "rope_scaling": None}
        raw |= {"torch_dtype": raw.pop("dtype"), "transformers_version": "4.51.0"}
        file.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The continuation by argmax, all recomputed for each token, and its gaps. (S,) -> 2 x (N,)"""
    sequence, gaps = ids.tolist(), []
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
        best = logits.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        sequence.append(int(best.indices[0]))
    return np.array(sequence[len(ids) :]), np.array(gaps)


@torch.no_grad()
def traced(model: Qwen3ForCausalLM, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every intermediate of one pass, by the names and with the shapes of
    qwen3_tg_numpy.model.Trace, read from transformers' own modules. ids: (S,)"""
    seen: dict[str, np.ndarray] = {}
    with _watched(model, seen):
        model(torch.tensor([ids.tolist()]), use_cache=False)
    return seen


@contextmanager
def _watched(model: Qwen3ForCausalLM, seen: dict[str, np.ndarray]) -> Iterator[None]:
    """Hooks that fill `seen` while they last."""
    eager = modeling_qwen3.eager_attention_forward

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value[0].float().numpy().copy()  # without the batch axis

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        """Eager attention; q: (B, H, S, Hd), k: (B, K, S, Hd), after norm and rotation."""
        name = f"layers.{module.layer_idx}.self_attn"
        keep(f"{name}.q_rope", q.transpose(1, 2))
        keep(f"{name}.k_rope", k.transpose(1, 2))
        repeated = modeling_qwen3.repeat_kv(k, module.num_key_value_groups)
        keep(f"{name}.scores", q @ repeated.transpose(2, 3) * module.scaling)
        mixed, probs = eager(module, q, k, *rest, **kwargs)
        keep(f"{name}.probs", probs)
        return mixed, probs

    handles = []
    for full_name, module in model.named_modules():
        name = full_name.removeprefix("model.")
        kind = type(module).__name__
        if name.endswith(("o_proj", "down_proj")):
            before = name.replace("o_proj", "mix").replace("down_proj", "act")
            handles.append(
                module.register_forward_pre_hook(lambda _, args, n=before: keep(n, args[0]))
            )
        if kind in ("Linear", "Embedding", "Qwen3RMSNorm", "Qwen3DecoderLayer"):
            handles.append(module.register_forward_hook(lambda _, __, out, n=name: keep(n, out)))
    try:
        with mock.patch.object(modeling_qwen3, "eager_attention_forward", attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
