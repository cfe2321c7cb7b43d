"""The checkpoints of tests/golden: their sizes and rules, random weights, and writing them to disk.

make_golden.py records what transformers computes from them.

Weights are drawn by numpy, so they do not change with torch. Norm weights lie away from one, some
are negative, and q_norm's differ from k_norm's: a model that forgets one of them cannot pass. The
final norm is scaled to logits of standard deviation one, so that one tolerance fits all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

RELEASED_CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "qwen3_configs.json"


@dataclass(frozen=True)
class Experts:
    """The mixture layers of a case: E experts of intermediate size F, `per_token` of them used.

    Layer i is a mixture where `step` divides i + 1 and `dense_layers` does not name it."""

    E: int
    per_token: int
    F: int
    normalised: bool
    step: int = 1
    dense_layers: tuple[int, ...] = ()

    def at(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.step == 0


@dataclass(frozen=True)
class Case:
    """One checkpoint. Sizes by their axis letters; `style` is the transformers that config.json is
    written like; `shard_kb` splits the weights (0: one file).

    `scaling` is what the config says of rotation beside rope_theta. `released` names the model
    whose config.json this one copies, key by key. `stores_head`: lm_head.weight is in the file
    although it is tied, as in the released 0.6B and 1.7B."""

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
    experts: Experts | None = None
    scaling: dict[str, Any] | None = None
    max_positions: int = 128
    released: str = ""
    stores_head: bool = False

    @property
    def bos(self) -> int:
        """<|endoftext|>: the released vocabulary has rows without a token after its end tokens."""
        return self.V - 7 if self.released else self.V - 2

    @property
    def eos(self) -> int:
        """<|im_end|>, which base models do not end with."""
        if self.released.endswith("-Base"):
            return self.bos
        return self.V - 5 if self.released else self.V - 1


def family(name: str, stores_head: bool = False, shard_kb: int = 64) -> Case:
    """A released model with every rule of its config.json and the sizes divided: hidden_size by 64,
    head_dim by 16, heads by 4, intermediate_size by 512, that of experts by 256, the number of
    experts by 8; two layers."""
    config = released_config(name)
    experts = None
    if config["model_type"] == "qwen3_moe":
        assert config["decoder_sparse_step"] == 1 and not config["mlp_only_layers"]
        experts = Experts(
            E=config["num_experts"] // 8,
            per_token=config["num_experts_per_tok"],
            F=config["moe_intermediate_size"] // 256,
            normalised=config["norm_topk_prob"],
        )
    return Case(
        f"family_{name}",
        V=109,
        D=config["hidden_size"] // 64,
        F=config["intermediate_size"] // 512,
        L=2,
        H=config["num_attention_heads"] // 4,
        K=config["num_key_value_heads"] // 4,
        Hd=config["head_dim"] // 16,
        S=36,
        tied=config["tie_word_embeddings"],
        dtype=config["torch_dtype"],
        theta=config["rope_theta"],
        style=4,
        eps=config["rms_norm_eps"],
        shard_kb=shard_kb,
        experts=experts,
        max_positions=config["max_position_embeddings"],
        released=name,
        stores_head=stores_head,
    )


def released_config(name: str) -> dict[str, Any]:
    """config.json of a released model, with generation_config beside its fields.

    A base model differs from the chat model of its size in these fields alone."""
    released = json.loads(RELEASED_CONFIGS.read_text())
    config: dict[str, Any] = dict(released[name.removesuffix("-Base")])
    del config["_meta"]
    if name.endswith("-Base"):
        end = config["bos_token_id"]
        config |= {"max_position_embeddings": 32768, "eos_token_id": end}
        config["generation_config"] = {
            "bos_token_id": end,
            "do_sample": False,
            "eos_token_id": end,
            "max_new_tokens": 2048,
            "transformers_version": config["transformers_version"],
        }
    return config


# --- the cases

# The ramp from unchanged to divided frequencies runs over pairs 0 to 4 of 32 here; with the wider
# betas of the explicit case over 2 to 6, so that it has both ends. S ends beyond the original
# length three times over.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPLICIT_YARN = {
    "rope_type": "yarn",
    "factor": 3.0,
    "original_max_position_embeddings": 40,
    "attention_factor": 1.25,
    "beta_fast": 2.5,
    "beta_slow": 0.5,
}
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
    Case(
        "moe_bfloat16", 151, 40, 88, 2, 4, 2, 16, 40, False, "bfloat16", 1e6, 4, shard_kb=48,
        experts=Experts(8, 2, 24, normalised=True),
    ),
    # Layers 1 and 3 have their turn to be mixtures, but 1 is named dense: only 3 is one.
    Case(
        "moe_mixed_float32", 139, 24, 56, 4, 4, 2, 12, 40, True, "float32", 1e6, 5,
        experts=Experts(7, 3, 20, normalised=False, step=2, dense_layers=(1,)),
    ),
    Case(
        "yarn_bfloat16", 127, 32, 56, 2, 4, 2, 64, 100, True, "bfloat16", 1e6, 5, scaling=YARN,
    ),
    # max_position_embeddings stays that of the model without YaRN, as Qwen's model cards advise.
    Case(
        "yarn_v4_bfloat16", 127, 32, 56, 2, 4, 2, 64, 100, True, "bfloat16", 1e6, 4, scaling=YARN,
        max_positions=40,
    ),
    Case(
        "yarn_explicit_float16", 127, 32, 56, 2, 4, 2, 64, 96, False, "float16", 1e6, 5,
        scaling=EXPLICIT_YARN, max_positions=120,
    ),
    Case(
        "yarn_moe_bfloat16", 127, 32, 56, 2, 4, 2, 32, 100, False, "bfloat16", 1e7, 4, scaling=YARN,
        max_positions=40, experts=Experts(8, 2, 24, normalised=True),
    ),
    family("Qwen3-0.6B", stores_head=True, shard_kb=0),
    family("Qwen3-0.6B-Base", shard_kb=0),
    family("Qwen3-1.7B", stores_head=True),
    family("Qwen3-4B"),
    family("Qwen3-4B-Instruct-2507"),
    family("Qwen3-8B"),
    family("Qwen3-14B"),
    family("Qwen3-32B"),
    family("Qwen3-30B-A3B"),
    family("Qwen3-30B-A3B-Instruct-2507"),
    family("Qwen3-235B-A22B"),
    family("Qwen3-235B-A22B-Thinking-2507"),
)  # fmt: skip


# --- weights


def random_weights(case: Case, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by the name that it has in the file, in the stored type."""

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.normal(0, inputs**-0.5, (outputs, inputs))

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.4, 1.8, size) * np.where(rng.random(size) < 0.15, -1, 1)

    def add_mlp(prefix: str, F: int) -> None:
        w[f"{prefix}.gate_proj.weight"] = matrix(F, c.D)
        w[f"{prefix}.up_proj.weight"] = matrix(F, c.D)
        w[f"{prefix}.down_proj.weight"] = matrix(c.D, F) * 2

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
        if c.experts and c.experts.at(i):
            w[f"{layer}.mlp.gate.weight"] = matrix(c.experts.E, c.D)
            for e in range(c.experts.E):
                add_mlp(f"{layer}.mlp.experts.{e}", c.experts.F)
        else:
            add_mlp(f"{layer}.mlp", c.F)
    # |norm(x)| is about sqrt(D) times the norm's size, rows of the head have length one
    final = norm(c.D)
    w["model.norm.weight"] = final / np.sqrt(np.mean(final**2))
    if not c.tied:
        w["lm_head.weight"] = matrix(c.V, c.D)
    elif c.stores_head:
        w["lm_head.weight"] = w["model.embed_tokens.weight"]
    dtype = getattr(torch, c.dtype)
    return {name: torch.from_numpy(value).to(dtype) for name, value in w.items()}


def fused(case: Case, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as transformers 5 holds them: the experts of a layer in two tensors.

    gate_up_proj: (E, 2 * F, D), down_proj: (E, D, F)"""
    held = {name: value for name, value in weights.items() if ".experts." not in name}
    for i in range(case.L):
        if case.experts and case.experts.at(i):
            prefix = f"model.layers.{i}.mlp.experts"
            gate, up, down = (
                torch.stack([weights[f"{prefix}.{e}.{part}.weight"] for e in range(case.experts.E)])
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            held[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
            held[f"{prefix}.down_proj"] = down
    return held


# --- on disk


def save(case: Case, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A directory as transformers saves it, experts one by one; in style 4, config.json is as Qwen
    released it."""
    # A head that is equal but not tied: transformers leaves out a tied one.
    tied = case.tied and not case.stores_head
    model = _empty_model(case, tied)
    unset = model.load_state_dict(fused(case, weights), strict=False).missing_keys
    assert unset == (["lm_head.weight"] if tied else []), unset
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=case.bos,
        eos_token_id=[case.eos, case.bos],
        pad_token_id=case.bos,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    model.save_pretrained(folder, max_shard_size=f"{case.shard_kb or 10_000}KB")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # they are saved for their owner alone
    if case.released:
        _write_released_configs(case, folder)
    elif case.style == 4:
        _rewrite_config_in_style_4(case, folder / "config.json")


def _empty_model(case: Case, tied: bool) -> PreTrainedModel:
    fields: dict[str, Any] = {
        "vocab_size": case.V,
        "hidden_size": case.D,
        "intermediate_size": case.F,
        "num_hidden_layers": case.L,
        "num_attention_heads": case.H,
        "num_key_value_heads": case.K,
        "head_dim": case.Hd,
        "max_position_embeddings": case.max_positions,
        "rms_norm_eps": case.eps,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": case.theta}
        | (case.scaling or {}),
        "bos_token_id": case.bos,
        "eos_token_id": case.eos,
        "dtype": case.dtype,
    }
    if not case.experts:
        return Qwen3ForCausalLM(Qwen3Config(**fields)).to(getattr(torch, case.dtype))
    fields |= {
        "num_experts": case.experts.E,
        "num_experts_per_tok": case.experts.per_token,
        "moe_intermediate_size": case.experts.F,
        "norm_topk_prob": case.experts.normalised,
        "decoder_sparse_step": case.experts.step,
        "mlp_only_layers": list(case.experts.dense_layers),
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).to(getattr(torch, case.dtype))


def _rewrite_config_in_style_4(case: Case, file: Path) -> None:
    raw = json.loads(file.read_text())
    for name in ("layer_types", "pad_token_id", "rope_parameters"):
        raw.pop(name, None)
    if case.experts:
        raw["num_experts"] = raw.pop("num_local_experts")  # transformers 5 renamed it
    raw |= {"rope_theta": int(case.theta), "rope_scaling": case.scaling}
    raw |= {"torch_dtype": raw.pop("dtype"), "transformers_version": "4.51.0"}
    file.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _write_released_configs(case: Case, folder: Path) -> None:
    """Both files with the released keys in the released order, sizes and ids apart."""
    config = released_config(case.released)
    generation = config.pop("generation_config")
    ids = {"bos_token_id": case.bos, "eos_token_id": case.eos}
    config |= ids | {
        "vocab_size": case.V,
        "hidden_size": case.D,
        "intermediate_size": case.F,
        "num_hidden_layers": case.L,
        "num_attention_heads": case.H,
        "num_key_value_heads": case.K,
        "head_dim": case.Hd,
    }
    if case.experts:
        config |= {"num_experts": case.experts.E, "moe_intermediate_size": case.experts.F}
    ends = [case.eos, case.bos] if isinstance(generation["eos_token_id"], list) else case.eos
    generation |= ids | {"eos_token_id": ends}
    if "pad_token_id" in generation:
        generation["pad_token_id"] = case.bos
    for name, fields in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")
