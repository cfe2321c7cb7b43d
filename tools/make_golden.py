"""Record golden values: tiny random Qwen3 checkpoints and what transformers computes from them.

    python tools/make_golden.py --out tests/golden

Names of cases behind it record these alone: on another processor the last digits of all differ.

Each folder is a Hugging Face directory as users have them (config.json, generation_config.json, one
safetensors file or shards; golden_cases.py makes them) with golden.npz beside it, recorded with
Qwen3ForCausalLM or Qwen3MoeForCausalLM, eager attention and experts, float32, from the weights as
stored:

    ids             (S,)       the prompt
    logits          (S, V)     of every position
    embed_tokens    (S, D)     and layers.{i}, norm: the hidden states
    greedy_ids      (N,)       the tokens that follow by argmax, end tokens ignored, without a cache
    greedy_gaps     (N,)       best less second-best logit at each of them

TRACED has trace.npz too: every intermediate of the first TRACE_LENGTH ids, by the names and shapes
of qwen3_tg_numpy.model.Trace. versions.json says what recorded it all.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors
import torch
import transformers
from golden_cases import CASES, Case, fused, random_weights, save
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 24
SMALLEST_GAP = (
    0.01  # 100 times the tolerance on logits, so that no rounding can change a greedy token
)
# Between the last expert chosen and the first left out: rounding must not exchange them either.
SMALLEST_ROUTER_GAP = 0.002
MOST_REPEATS = 4  # of one token in the greedy path; more would test little
TRACED, TRACE_LENGTH = "untied_bfloat16", 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Record golden values with transformers.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the cases to")
    parser.add_argument("names", nargs="*", help="cases to record, the others stay; default: all")
    args = parser.parse_args()
    if unknown := set(args.names) - {case.name for case in CASES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    out: Path = args.out
    file = out / "versions.json"
    recorded: dict[str, Any] = json.loads(file.read_text())["cases"] if file.exists() else {}
    for case in CASES:
        if not args.names or case.name in args.names:
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
        "cases": {case.name: recorded[case.name] for case in CASES if case.name in recorded},
    }
    file.write_text(json.dumps(versions, indent=1) + "\n")


def record(case: Case, folder: Path) -> dict[str, Any]:
    """Write one case with the first seed that gives a clear greedy path.

    Gives what versions.json says of it."""
    for seed in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        rng = np.random.default_rng(seed)
        weights = random_weights(case, rng)
        save(case, weights, folder)
        model = load(folder)
        held = model.state_dict()
        for name, value in fused(case, weights).items():
            assert torch.equal(held[name], value.float()), f"{case.name}: {name} reads otherwise"
        ids = rng.integers(0, case.V, case.S)
        ids[3], ids[7], ids[11] = 0, case.V - 1, ids[10]  # both ends of the vocabulary, a repeat
        greedy_ids, gaps = greedy(model, ids)
        repeats = np.bincount(greedy_ids).max()
        ends = {case.bos, case.eos} & set(greedy_ids.tolist())
        router_gap = smallest_router_gap(model, np.concatenate([ids, greedy_ids]))
        clear = gaps.min() > SMALLEST_GAP and router_gap > SMALLEST_ROUTER_GAP
        if clear and repeats <= MOST_REPEATS and not ends:
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
    says = {
        "seed": seed,
        "smallest_greedy_gap": round(float(gaps.min()), 5),
        "logits_std": round(float(logits.std()), 4),
    }
    if case.experts:
        says["smallest_router_gap"] = round(router_gap, 5)
    if case.scaling:
        original = case.scaling["original_max_position_embeddings"]
        error = np.abs(logits_without_scaling(model, ids) - logits).max(axis=1)
        says["without_yarn_up_to_original"] = round(float(error[:original].max()), 2)
        says["without_yarn_beyond"] = round(float(error[original:].max()), 2)
    return says


def load(folder: Path) -> PreTrainedModel:
    """What users load: a change in how transformers reads these files would show here."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The continuation by argmax, all recomputed for each token, and its gaps. (S,) -> 2 x (N,)"""
    sequence, gaps = ids.tolist(), []
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
        best = logits.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        sequence.append(int(best.indices[0]))
    return np.array(sequence[len(ids) :]), np.array(gaps)


@torch.no_grad()
def smallest_router_gap(model: PreTrainedModel, ids: np.ndarray) -> float:
    """The least distance between the router logits of the last expert chosen and the first left
    out, over all positions and mixture layers; infinite without them. ids: (S,)"""
    gaps = [float("inf")]

    def watch(router: Any, _: Any, out: tuple[torch.Tensor, ...]) -> None:
        best = out[0].topk(router.top_k + 1).values  # (S, top_k + 1)
        gaps.append(float((best[:, -2] - best[:, -1]).min()))

    routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    handles = [router.register_forward_hook(watch) for router in routers]
    model(torch.tensor([ids.tolist()]), use_cache=False)
    for handle in handles:
        handle.remove()
    return min(gaps)


@torch.no_grad()
def logits_without_scaling(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """What a model that ignores YaRN would compute. ids: (S,) -> (S, V)"""
    config = copy.deepcopy(model.config)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    unscaled = type(model.model.rotary_emb)(config)
    with mock.patch.object(model.model, "rotary_emb", unscaled):
        logits: np.ndarray = model(torch.tensor([ids.tolist()]), use_cache=False).logits[0].numpy()
    return logits


@torch.no_grad()
def traced(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every intermediate of one pass, by the names and with the shapes of
    qwen3_tg_numpy.model.Trace, read from transformers' own modules. ids: (S,)"""
    seen: dict[str, np.ndarray] = {}
    with _watched(model, seen):
        model(torch.tensor([ids.tolist()]), use_cache=False)
    return seen


@contextmanager
def _watched(model: PreTrainedModel, seen: dict[str, np.ndarray]) -> Iterator[None]:
    """Hooks that fill `seen` while they last."""
    modeling = sys.modules[type(model).__module__]  # of the dense models, or of mixtures
    eager = modeling.eager_attention_forward

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value[0].float().numpy().copy()  # without the batch axis

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        """Eager attention; q: (B, H, S, Hd), k: (B, K, S, Hd), after norm and rotation."""
        name = f"layers.{module.layer_idx}.self_attn"
        keep(f"{name}.q_rope", q.transpose(1, 2))
        keep(f"{name}.k_rope", k.transpose(1, 2))
        repeated = modeling.repeat_kv(k, module.num_key_value_groups)
        keep(f"{name}.scores", q @ repeated.transpose(2, 3) * module.scaling)
        mixed, probs = eager(module, q, k, *rest, **kwargs)
        keep(f"{name}.probs", probs)
        return mixed, probs

    handles = []
    for full_name, module in model.named_modules():
        name = full_name.removeprefix("model.")
        kind = type(module).__name__.replace("Qwen3Moe", "Qwen3")
        if name.endswith(("o_proj", "down_proj")):
            before = name.replace("o_proj", "mix").replace("down_proj", "act")
            handles.append(
                module.register_forward_pre_hook(lambda _, args, n=before: keep(n, args[0]))
            )
        if kind in ("Linear", "Embedding", "Qwen3RMSNorm", "Qwen3DecoderLayer"):
            handles.append(module.register_forward_hook(lambda _, __, out, n=name: keep(n, out)))
    try:
        with mock.patch.object(modeling, "eager_attention_forward", attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
