"""Every format of checkpoint, in the engine and in the reference, against the reference on a
float32 checkpoint of the same values (format_writers.py)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
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
    TABLE_TYPES,
    Weights,
    gguf_name,
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)

import qwen3_tg
from qwen3_tg.device import KERNELS

# Measured: 0.009, nearly all of it from rounding keys and values to float16.
FAST_TOLERANCE = 0.02
# Measured: 39 of 40 positions in one case, all in the others.
MOE_NEAR = 0.95
S = 40  # more than a chunk of prefill, of 32
# Lengths asked for in turn: prefill of less than a chunk, decode, prefill behind that, decode.
CACHED = [9, 10, 11, 36, 37, 38, S]
MOE, DENSE = True, False
Record = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """`write` takes a path, a config and weights, and `options`. `name` is the row of the report,
    `variant` what is special; `open` is the file to load in the folder, or the folder. `quick`
    ones run in the engine always, all of them for a report only: each new kernel takes seconds."""

    name: str
    write: Callable[..., Weights]
    moe: bool
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    open: str = ""
    quick: bool = False

    def __str__(self) -> str:
        name = re.sub(", .*, ", " to ", self.name)
        words = [name, self.variant.replace(",", ""), "moe" if self.moe else "dense"]
        return " ".join(filter(None, words)).replace(" ", "-")


def mixed(name: str) -> str:
    """Types by tensor as Q4_K_M has them."""
    wide = "attn_v" in name or "ffn_down" in name
    return "Q6_K" if name in ("output.weight", "token_embd.weight") or wide else "Q4_K"


def some_of(types: Sequence[str], moe: bool, name: str) -> str:
    """Each of these types in one tensor; mixtures have them in the experts."""
    parts = name.split(".")
    kinds = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] if moe else DENSE_TENSORS
    if parts[0] != "blk":
        return types[-1]
    if parts[2] not in kinds:
        return "F16"
    return types[(int(parts[1]) * len(kinds) + kinds.index(parts[2])) % len(types)]


DENSE_TENSORS = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
TYPES = ("F32", "F16", "BF16", *BLOCK_TYPES)
SOME_TYPES = ("Q4_0", "Q8_0", "IQ2_XS", "IQ4_XS", "Q6_K", "Q4_K")
ONE = {"num_hidden_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROUTERS = {f"model.layers.{i}.mlp.gate": {"bits": 8, "group_size": 64} for i in (0, 1)}
OVERRIDES = {
    "model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 32},
    "model.layers.1.self_attn.o_proj": False,
}
EDGES = {"hidden_size": 192, "intermediate_size": 320, **ONE}


def safetensors_cases(moe: bool) -> Iterator[Case]:
    case = partial(Case, write=write_float, moe=moe)
    for dtype in ("float32", "float16", "bfloat16"):
        yield case(f"safetensors {dtype}", options={"dtype": dtype}, sizes=ONE)
    options = {"dtype": "bfloat16", "shards": 3}
    yield case("safetensors bfloat16", variant="shards", options=options, quick=moe)


def gguf_cases(moe: bool) -> Iterator[Case]:
    case = partial(Case, write=write_gguf, moe=moe, open="model.gguf")
    for type in TYPES:
        yield case(f"GGUF {type}", options={"type_of": type}, sizes=ONE)
    together = [SOME_TYPES] if moe else [TYPES[:14], TYPES[14:]]
    for types in together:
        yield case(
            f"GGUF {', '.join(types)}",
            variant="together",
            options={"type_of": partial(some_of, types, moe)},
            quick=True,
        )
    yield case("GGUF Q4_K_M", options={"type_of": mixed}, tied=not moe)
    parts = {"type_of": "Q8_0", "split": 3}
    yield case("GGUF parts", options=parts, open="model-00001-of-00003.gguf")
    if moe:
        return
    yield case(
        "GGUF parts",
        variant="no tensors in the first, opened by the last",
        options=parts | {"empty_first_part": True},
        sizes=ONE,
        open="model-00003-of-00003.gguf",
        quick=True,
    )
    one = partial(case, options={"type_of": "Q8_0"}, sizes=ONE)
    yield one("GGUF Q8_0", variant="version 2", options={"type_of": "Q8_0", "version": 2})
    yield one("GGUF Q8_0", variant="YaRN", sizes={"rope_scaling": YARN, **ONE}, quick=True)
    output = {"type_of": mixed, "tied_output": True}
    yield one("GGUF Q4_K_M", variant="tied, with output", options=output, tied=True)


def packed_cases(moe: bool) -> Iterator[Case]:
    awq = partial(Case, "AWQ 4-bit", write_awq, moe, sizes=ONE)
    yield awq(options={"shards": 2}, quick=True)
    yield awq(variant="bfloat16", options={"dtype": "bfloat16", "skip": ["o_proj"]})
    gptq = partial(Case, "GPTQ 4-bit", write_gptq, moe, sizes=ONE)
    yield gptq(options={"shards": 2}, quick=moe)
    yield gptq(variant="asymmetric", options={"sym": False})
    act_order = {"sym": False, "act_order": True}
    yield gptq(variant="act order", options=act_order, quick=not moe)
    yield gptq(variant="v2", options={"sym": False, "v2": True, "dtype": "bfloat16"})
    yield Case("GPTQ 8-bit", write_gptq, moe, options={"bits": 8}, sizes=ONE, quick=not moe)
    fp8 = partial(Case, "FP8", write_fp8, moe)
    yield fp8(options={"shards": 2}, quick=moe)
    kept = {"skip": ["model.layers.0.self_attn.o_proj"]}
    edges = EDGES | {"moe_intermediate_size": 320} if moe else EDGES
    yield fp8(
        variant="partial blocks",
        options=kept | {"scale_dtype": "float16"},
        sizes=edges,
        quick=not moe,
    )
    yield fp8(variant="float32 scales", options={"scale_dtype": "float32"}, sizes=ONE)
    mlx = partial(Case, "MLX 4-bit", write_mlx, moe)
    overrides = OVERRIDES | ROUTERS if moe else OVERRIDES
    yield mlx(options={"shards": 2}, sizes=ONE)
    yield mlx(
        variant="group 32", options={"group_size": 32, "dtype": "float16"}, sizes=ONE, tied=True
    )
    one_block = {"overrides": overrides, "both_blocks": False}
    yield mlx(variant="overrides", options=one_block, tied=not moe, quick=True)
    yield Case("MLX 8-bit", write_mlx, moe, options={"bits": 8}, sizes=ONE, quick=not moe)


def rare_cases() -> Iterator[Case]:
    awq = partial(Case, "AWQ 4-bit", write_awq, DENSE, sizes=ONE)
    yield awq("one group", options={"group_size": -1})
    yield awq("format for version", options={"version": None, "format": "gemm"})
    gptq = partial(Case, "GPTQ 4-bit", write_gptq, DENSE, sizes=ONE)
    skip = {"dynamic": {r"-:.*\.k_proj": {}}, "lm_head": True}
    yield gptq("some float, and the head not", options=skip)
    other = {r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}
    yield gptq("other settings by module", options={"dynamic": other})
    older = dict.fromkeys(["checkpoint_format", "hyb_act", "meta", "pack_dtype"])
    yield gptq("as older tools write it", options=older | {"is_marlin_format": False})
    yield gptq("without g_idx", options={"with_g_idx": False})
    yield gptq("quantize_config.json", options={"separate_config": True})
    yield Case("GPTQ 2-bit", write_gptq, DENSE, "", {"bits": 2}, ONE)
    ignored = {"skip": ["model.layers.0.mlp.up_proj"], "skip_key": "ignored_layers"}
    yield Case("FP8", write_fp8, DENSE, "ignored_layers", ignored, ONE)
    for bits in (2, 3, 5, 6):
        yield Case(f"MLX {bits}-bit", write_mlx, DENSE, "", {"bits": bits}, ONE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine_case" in metafunc.fixturenames:
        all_of_them = metafunc.config.getoption("--formats-report") is not None
        chosen = [case for case in CASES if case.quick or all_of_them]
        metafunc.parametrize("engine_case", [with_mark(case) for case in chosen], ids=str)


def with_mark(case: Case) -> Any:
    refused = case.name in ("MLX 3-bit", "MLX 5-bit", "MLX 6-bit")
    error = qwen3_tg.UnsupportedError
    return pytest.param(case, marks=pytest.mark.xfail(raises=error, strict=True) if refused else ())


CASES = [
    case
    for moe in (DENSE, MOE)
    for cases in (safetensors_cases, gguf_cases, packed_cases)
    for case in cases(moe)
] + list(rare_cases())


@dataclass(frozen=True)
class Written:
    """What to load, and what it must compute for `ids`: (S, V). `engine_logits`: the engine keeps
    some types as float16."""

    path: Path
    ids: list[int]
    logits: np.ndarray
    engine_logits: np.ndarray


def rounded_by_the_engine(case: Case, values: Weights) -> Weights:
    """The engine has no kernels for GGUF's types of tables: it makes them float16 at load."""
    if case.write is not write_gguf:
        return {}
    type_of = case.options["type_of"]
    rounded = {}
    for name, value in values.items():
        type = type_of if isinstance(type_of, str) else type_of(gguf_name(name))
        if type in TABLE_TYPES and value.ndim == 2 and not name.endswith("mlp.gate.weight"):
            rounded[name] = value.astype(np.float16).astype(np.float32)
    return rounded


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
        ids = np.random.default_rng(3).integers(0, config["vocab_size"], S).tolist()

        def computed(values: Weights) -> np.ndarray:
            write_float(folder / "float32", config, values)
            logits = qwen3_tg_numpy.load(folder / "float32").logits(ids)
            shutil.rmtree(folder / "float32")
            return logits

        logits = engine_logits = computed(values)
        if rounded := rounded_by_the_engine(case, values):
            engine_logits = computed(values | rounded)
        assert 0.3 < logits.std() < 3, "the tolerance is for logits of about one"
        return Written(folder / case.open, ids, logits, engine_logits)

    return lambda case: write(str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_computes_the_values_of_the_file(
    case: Case, written: Callable[[Case], Written], record_format: Record
) -> None:
    expected = written(case)
    logits = qwen3_tg_numpy.load(expected.path).logits(expected.ids)
    assert_close(logits, expected.logits, FLOAT32_TOLERANCE)
    record(record_format, case, "qwen3_tg_numpy", "numpy", logits, expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_engine_computes_the_values_of_the_file(
    kernels: str,
    engine_case: Case,
    written: Callable[[Case], Written],
    record_format: Record,
) -> None:
    case, expected = engine_case, written(engine_case)
    llm = qwen3_tg.load(str(expected.path), kernels=kernels)
    assert llm.policy.kernels == kernels
    tolerance = FAST_TOLERANCE if kernels == "fast" else FLOAT32_TOLERANCE
    rows = [llm._engine.next_logits(expected.ids[:length]) for length in CACHED]
    right = expected.engine_logits
    cached, logits = np.array(rows), llm.logits(expected.ids)
    if case.moe and kernels == "fast":  # a near tie of two experts may fall the other way
        near = np.abs(logits - right).max(axis=-1) <= tolerance
        assert near.mean() >= MOE_NEAR
        return
    assert_close(cached, right[[n - 1 for n in CACHED]], tolerance)
    assert_close(logits, right, tolerance)
    record(record_format, case, f"qwen3_tg {kernels}", llm.policy.device, logits, expected)


def record(
    record_format: Record, case: Case, engine: str, device: str, logits: np.ndarray, right: Written
) -> None:
    kind, _, names = case.name.partition(" ")
    for name in names.split(", ") if kind == "GGUF" else [names]:
        record_format(
            format=f"{kind} {name}".strip(),
            variant=case.variant,
            model="moe" if case.moe else "dense",
            engine=engine,
            device=device,
            max_abs_error=float(np.abs(logits - right.logits).max()),
        )
