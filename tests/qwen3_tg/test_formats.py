"""Every format of checkpoint, in the engine and in the reference, against the reference on a
float32 checkpoint of the same values (format_writers.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import FLOAT32_TOLERANCE, assert_close
from format_writers import (
    BLOCK_TYPES,
    Weights,
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)

import qwen3_tg

S = 40  # more than a chunk of prefill, of 32
# Lengths asked for in turn: prefill of less than a chunk, decode, prefill behind that, decode.
CACHED = [9, 10, 11, 36, 37, 38, S]
MOE, DENSE = True, False
Record = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """`write` takes a path, a config and weights, and `options`. `name` is the row of the report,
    `variant` what is special; `open` is the file to load in the folder, or the folder."""

    name: str
    write: Callable[..., Weights]
    moe: bool
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    open: str = ""

    def __str__(self) -> str:
        words = [self.name, self.variant, "moe" if self.moe else "dense"]
        return " ".join(filter(None, words)).replace(" ", "-")


def mixed(name: str) -> str:
    """Types by tensor as Q4_K_M has them."""
    wide = "attn_v" in name or "ffn_down" in name
    return "Q6_K" if name in ("output.weight", "token_embd.weight") or wide else "Q4_K"


def dynamic(name: str) -> str:
    """Many types in one file, as in the smallest files of mixtures; other ones in each layer."""
    types = ["IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q5_K", "IQ4_XS", "Q3_K", "IQ2_S", "Q8_0"]
    return "Q4_K" if "blk" not in name else types[sum(map(ord, name)) % len(types)]


ONE = {"num_hidden_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROUTERS = {f"model.layers.{i}.mlp.gate": {"bits": 8, "group_size": 64} for i in (0, 1)}
OVERRIDES = {
    "model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 32},
    "model.layers.1.self_attn.o_proj": False,
}
EDGES = {"hidden_size": 192, "intermediate_size": 320, **ONE}


def cases() -> list[Case]:
    found = []
    for dtype in ("float32", "float16", "bfloat16"):
        name = f"safetensors {dtype}"
        found += [Case(name, write_float, moe, "", {"dtype": dtype}, ONE) for moe in (DENSE, MOE)]
    found += [
        Case("safetensors bfloat16", write_float, moe, "shards", {"dtype": "bfloat16", "shards": 3})
        for moe in (DENSE, MOE)
    ]
    for type in ("F32", "F16", "BF16", *BLOCK_TYPES):
        gguf = partial(Case, f"GGUF {type}", write_gguf, open="model.gguf", sizes=ONE)
        found += [gguf(moe, "", {"type_of": type}) for moe in (DENSE, MOE)]
    gguf = partial(Case, open="model.gguf")
    parts = {"type_of": "Q8_0", "split": 3}
    for moe in (DENSE, MOE):
        found += [
            gguf("GGUF mixed types", write_gguf, moe, "Q4_K_M", {"type_of": mixed}),
            gguf("GGUF mixed types", write_gguf, moe, "dynamic", {"type_of": dynamic}),
            Case("GGUF parts", write_gguf, moe, "", parts, open="model-00001-of-00003.gguf"),
        ]
    found += [
        Case(
            "GGUF parts",
            write_gguf,
            DENSE,
            "without tensors in the first, opened by the last",
            parts | {"empty_first_part": True},
            ONE,
            open="model-00003-of-00003.gguf",
        ),
        gguf("GGUF Q8_0", write_gguf, DENSE, "version 2", {"type_of": "Q8_0", "version": 2}, ONE),
        gguf("GGUF Q4_K", write_gguf, DENSE, "tied", {"type_of": mixed}, ONE, tied=True),
        gguf(
            "GGUF Q4_K",
            write_gguf,
            DENSE,
            "tied with output",
            {"type_of": lambda name: "Q6_K" if name == "output.weight" else "Q4_K"}
            | {"tied_output": True},
            ONE,
            tied=True,
        ),
        gguf(
            "GGUF Q8_0",
            write_gguf,
            DENSE,
            "YaRN",
            {"type_of": "Q8_0"},
            {"rope_scaling": YARN, **ONE},
        ),
    ]
    for moe in (DENSE, MOE):
        awq, gptq, fp8, mlx = (
            partial(Case, name, write, moe)
            for name, write in (
                ("AWQ 4-bit", write_awq),
                ("GPTQ 4-bit", write_gptq),
                ("FP8", write_fp8),
                ("MLX 4-bit", write_mlx),
            )
        )
        edges = EDGES | {"moe_intermediate_size": 320} if moe else EDGES
        kept = ["model.layers.0.self_attn.o_proj"]
        found += [
            awq("", {"shards": 2}),
            awq("bfloat16", {"dtype": "bfloat16", "skip": ["o_proj"]}, ONE),
            gptq("", {"shards": 2}),
            gptq("asymmetric", {"sym": False}, ONE),
            gptq("act order", {"sym": False, "act_order": True}, ONE),
            gptq("v2", {"sym": False, "v2": True, "dtype": "bfloat16"}, ONE),
            Case("GPTQ 8-bit", write_gptq, moe, "", {"bits": 8}),
            fp8("", {"shards": 2}),
            fp8("partial blocks", {"scale_dtype": "float16", "skip": kept}, edges),
            fp8("float32 scales", {"scale_dtype": "float32"}, ONE),
            mlx("", {"overrides": ROUTERS if moe else None, "shards": 2}),
            mlx("group 32", {"group_size": 32, "dtype": "float16"}, ONE, tied=True),
            mlx("overrides", {"overrides": OVERRIDES, "both_blocks": False}),
            Case("MLX 8-bit", write_mlx, moe, "", {"bits": 8}, ONE),
        ]
    skip = {"dynamic": {r"-:.*\.k_proj": {}}}
    found += [
        Case("AWQ 4-bit", write_awq, DENSE, "one group", {"group_size": -1}, ONE),
        Case("GPTQ 4-bit", write_gptq, DENSE, "skip and head", skip | {"lm_head": True}, ONE),
        Case("GPTQ 4-bit", write_gptq, DENSE, "without g_idx", {"with_g_idx": False}, ONE),
        Case("GPTQ 4-bit", write_gptq, DENSE, "quantize_config", {"separate_config": True}, ONE),
        Case("GPTQ 2-bit", write_gptq, DENSE, "", {"bits": 2}, ONE),
        Case("MLX 2-bit", write_mlx, DENSE, "", {"bits": 2}, ONE),
        *(Case(f"MLX {b}-bit", write_mlx, DENSE, "", {"bits": b}, ONE) for b in (3, 5, 6)),
    ]
    return found


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True)
class Written:
    """What to load, and what it must compute for `ids`: (S, V)."""

    path: Path
    ids: list[int]
    logits: np.ndarray


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Written]:
    """Writes a case the first time it is asked for."""

    @cache
    def write(name: str) -> Written:
        case = next(case for case in CASES if str(case) == name)
        folder = tmp_path_factory.mktemp("format")
        config, weights = random_model(case.moe, case.tied, seed=11, **case.sizes)
        target = folder / "model.gguf" if case.write is write_gguf else folder
        values = case.write(target, config, weights, **case.options)
        # As values, the head of a GGUF file is tied only if the file has none.
        config["tie_word_embeddings"] = "lm_head.weight" not in values
        write_float(folder / "float32", config, values)
        ids = np.random.default_rng(3).integers(0, config["vocab_size"], S).tolist()
        logits = qwen3_tg_numpy.load(folder / "float32").logits(ids)
        shutil.rmtree(folder / "float32")
        assert 0.3 < logits.std() < 3, "the tolerance is for logits of about one"
        return Written(folder / case.open, ids, logits)

    return lambda case: write(str(case))


@every_case
def test_the_reference_computes_the_values_of_the_file(
    case: Case, written: Callable[[Case], Written], record_format: Record
) -> None:
    expected = written(case)
    logits = qwen3_tg_numpy.load(expected.path).logits(expected.ids)
    assert_close(logits, expected.logits, FLOAT32_TOLERANCE)
    record(record_format, case, "qwen3_tg_numpy", "numpy", logits, expected)


@every_case
def test_the_engine_computes_the_values_of_the_file(
    case: Case, written: Callable[[Case], Written], record_format: Record
) -> None:
    expected = written(case)
    llm = qwen3_tg.load(str(expected.path), dtype="float32")
    logits = llm.logits(expected.ids)
    assert_close(logits, expected.logits, FLOAT32_TOLERANCE)
    # Through the cache, whose steps are graphs of their own.
    rows = [llm._engine.next_logits(expected.ids[:length]) for length in CACHED]
    assert_close(np.array(rows), expected.logits[[n - 1 for n in CACHED]], FLOAT32_TOLERANCE)
    record(record_format, case, "qwen3_tg", llm.policy.device, logits, expected)


def record(
    record_format: Record, case: Case, engine: str, device: str, logits: np.ndarray, right: Written
) -> None:
    record_format(
        format=case.name,
        variant=case.variant,
        model="moe" if case.moe else "dense",
        engine=engine,
        device=device,
        max_abs_error=float(np.abs(logits - right.logits).max()),
    )
