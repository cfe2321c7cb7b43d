"""The reference's packed matrices: each formula by hand, each reader against a float checkpoint of
the same values, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import qwen3_tg_numpy
from format_writers import (
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gptq,
    write_mlx,
    write_safetensors,
)
from qwen3_tg_numpy import CheckpointError
from qwen3_tg_numpy.checkpoint import read_weights
from qwen3_tg_numpy.quantisation import find_scheme, read_scheme
from qwen3_tg_numpy.quantised import E4M3, Awq, Fp8, Gptq, Mlx, Packed, to_float32, unpack
from safetensors.numpy import load_file, save_file

IDS = [3, 141, 59, 26, 53, 58, 97, 93]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MLX = {"bits": 4, "group_size": 64}


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint32).view(np.int32)


def decode(scheme: Any, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """All rows, once at a time and once together."""
    whole = scheme.decode(parts, shape, np.arange(shape[0]))
    one_by_one = [scheme.decode(parts, shape, np.array([o]))[0] for o in range(shape[0])]
    assert whole.shape == shape
    assert whole.dtype == np.float32
    assert np.array_equal(whole, one_by_one, equal_nan=True)
    return whole


# --- by hand


def test_awq_interleaves_eight_outputs_in_a_word():
    parts = {
        "qweight": words(0x86427531)[None],
        "qzeros": words(0x88888888)[None],
        "scales": np.full((1, 8), 0.25, np.float16),
    }
    found = decode(Awq(group_size=-1), parts, (8, 1))
    assert found[:, 0].tolist() == [-1.75, -1.5, -1.25, -1, -0.75, -0.5, -0.25, 0]


def test_awq_zeros_are_stored_as_they_are_and_groups_run_along_the_inputs():
    parts = {
        "qweight": words(0, 0, 0xFFFFFFFF, 0xFFFFFFFF)[:, None],
        "qzeros": words(0x86427531, 0)[:, None],
        "scales": np.array([[1] * 8, [2] * 8], np.float32),
    }
    found = decode(Awq(group_size=2), parts, (8, 4))
    assert found[:, 0].tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]
    assert found[5].tolist() == [-6, -6, 30, 30]


def test_gptq_runs_down_the_inputs_and_adds_one_to_the_zero_of_its_first_version():
    parts = {
        "qweight": words(0x83F07A98)[None].repeat(8, axis=1),
        "qzeros": words(0x77777777)[None],
        "scales": np.full((1, 8), 0.5, np.float16),
    }
    found = decode(Gptq(bits=4, group_size=8, added_to_zero=1), parts, (8, 8))
    assert found[3].tolist() == [0, 0.5, 1, -0.5, -4, 3.5, -2.5, 0]
    second = decode(Gptq(bits=4, group_size=8, added_to_zero=0), parts, (8, 8))
    assert np.array_equal(second, found + 0.5)


def test_gptq_zeros_run_along_the_outputs_and_15_plus_1_is_16():
    parts = {
        "qweight": np.zeros((1, 8), np.int32),
        "qzeros": words(0xF6543210)[None],
        "scales": np.ones((1, 8), np.float32),
    }
    found = decode(Gptq(bits=4, group_size=-1, added_to_zero=1), parts, (8, 8))
    assert found[:, 0].tolist() == [-1, -2, -3, -4, -5, -6, -7, -16]


def test_gptq_looks_the_group_of_an_input_up_when_it_is_stored():
    parts = {
        "qweight": words(0x11111111)[None].repeat(8, axis=1),
        "qzeros": np.zeros((3, 1), np.int32),
        "scales": np.array([[1] * 8, [10] * 8, [100] * 8], np.float32),
        "g_idx": np.array([2, 0, 1, 1, 0, 2, 2, 0], np.int32),
    }
    found = decode(Gptq(bits=4, group_size=3, added_to_zero=0), parts, (8, 8))
    assert found[7].tolist() == [100, 1, 10, 10, 1, 100, 100, 1]
    del parts["g_idx"]
    found = decode(Gptq(bits=4, group_size=3, added_to_zero=0), parts, (8, 8))
    assert found[7].tolist() == [1, 1, 1, 10, 10, 10, 100, 100]


@pytest.mark.parametrize(
    ("bits", "word", "values"),
    [
        (8, 0x7F80FF01, [1, 255, 128, 127]),
        (2, 0xE4E4E4E4, [0, 1, 2, 3] * 4),
        (4, 0x83F07A98, [8, 9, 10, 7, 0, 15, 3, 8]),
    ],
)
def test_words_hold_their_first_value_in_the_lowest_bits(bits, word, values):
    assert unpack(words(word)[None], bits).tolist() == [values]


@pytest.mark.parametrize(
    ("bits", "octets", "values"),
    [(6, "813010", [1, 2, 3, 4]), (3, "D1581F", [1, 2, 3, 4, 5, 6, 7, 0])],
)
def test_values_cross_the_borders_of_words(bits, octets, values):
    rows = np.frombuffer(bytes.fromhex(octets) * 8, "<u4").reshape(2, 3)  # twice four times
    assert unpack(rows, bits).tolist() == [values * 4] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_stream_of_bits_is_one_large_number(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 64)
    number = sum(int(value) << bits * i for i, value in enumerate(values))
    stream = np.frombuffer(number.to_bytes(8 * bits, "little"), "<u4")
    assert unpack(stream[None], bits).tolist() == [values.tolist()]


def test_fp8_values_by_hand():
    found = E4M3[[0x3A, 0xC4, 0x01, 0x7E, 0x00, 0x80, 0x08, 0xFE]]
    assert found.tolist() == [1.25, -3, 2.0**-9, 448, 0, 0, 2.0**-6, -448]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()


def test_all_fp8_values_are_those_of_ml_dtypes():
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(E4M3, expected, equal_nan=True)
    assert np.array_equal(np.signbit(E4M3[:255]), np.signbit(expected[:255]))


def test_fp8_blocks_at_the_edges_are_partial():
    parts = {
        "weight": np.full((3, 5), 0x38, np.uint8),  # ones
        "weight_scale_inv": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    }
    found = decode(Fp8(block=(2, 2)), parts, (3, 5))
    assert found.tolist() == [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


def test_mlx_adds_a_bias_and_scales_may_be_negative():
    parts = {
        "weight": np.full((2, 1), 0x83F07A98, np.uint32),
        "scales": np.array([[0.5], [-0.5]], np.float16),
        "biases": np.array([[-4], [4]], np.float16),
    }
    found = decode(Mlx(bits=4, group_size=8, overrides={}), parts, (2, 8))
    assert found.tolist() == [
        [0, 0.5, 1, -0.5, -4, 3.5, -2.5, 0],
        [0, -0.5, -1, 0.5, 4, -3.5, 2.5, 0],
    ]


def test_a_packed_matrix_gives_the_rows_that_are_asked_for():
    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    packed = Packed((4, 3), lambda rows: matrix[rows])
    assert np.array_equal(packed[1:3], matrix[1:3])
    assert np.array_equal(packed[np.array([2, 0, 2])], matrix[[2, 0, 2]])
    with pytest.raises(IndexError):
        packed[np.array([4])]


# --- readers against the float checkpoint of what is in them

Writer = Callable[..., dict[str, np.ndarray]]
OVERRIDES = {
    "model.layers.0.self_attn.q_proj": False,
    "model.layers.0.mlp.gate": {"bits": 8, "group_size": 32},
    "model.layers.1.mlp.switch_mlp.up_proj": {"bits": 8, "group_size": 128},
    "model.layers.1.self_attn.o_proj": {"bits": 6},
    "lm_head": False,
}
DYNAMIC = {
    "-:.*q_proj": {},
    r"+:.*\.v_proj": {"bits": 8, "group_size": 32},
    r".*\.1\..*o_proj": {"bits": 2},
}
CASES: dict[str, tuple[Writer, dict[str, Any]]] = {
    "awq": (write_awq, {}),
    "awq, one group, shards": (write_awq, {"group_size": -1, "dtype": "bfloat16", "shards": 3}),
    "awq, some float": (write_awq, {"skip": ["self_attn"], "group_size": 64, "version": "GEMM"}),
    "gptq 2": (write_gptq, {"bits": 2, "group_size": 32}),
    "gptq 3": (write_gptq, {"bits": 3, "group_size": 64, "sym": False}),
    "gptq 4, order, zeros": (write_gptq, {"act_order": True, "sym": False, "shards": 2}),
    "gptq 4, version 2": (write_gptq, {"act_order": True, "sym": False, "v2": True}),
    "gptq 8": (write_gptq, {"bits": 8, "lm_head": True, "dtype": "bfloat16"}),
    "gptq, no g_idx, own file": (
        write_gptq,
        {"with_g_idx": False, "separate_config": True, "group_size": -1},
    ),
    "gptq, dynamic": (write_gptq, {"dynamic": DYNAMIC}),
    "fp8": (write_fp8, {}),
    "fp8, partial blocks": (write_fp8, {"block_size": 48, "scale_dtype": "float32"}),
    "fp8, some float": (
        write_fp8,
        {"scale_dtype": "float16", "skip": ["model.layers.0.self_attn.q_proj"]},
    ),
    "mlx 2": (write_mlx, {"bits": 2, "group_size": 32, "dtype": "float16"}),
    "mlx 3": (write_mlx, {"bits": 3}),
    "mlx 4": (write_mlx, {"mode": "affine", "shards": 2}),
    "mlx 6": (write_mlx, {"bits": 6, "both_blocks": False}),
    "mlx 8": (write_mlx, {"bits": 8, "group_size": 128}),
    "mlx, overrides": (write_mlx, {"overrides": OVERRIDES}),
}


# Matrices are equal; BLAS may take another way through a transposed one. Measured: 3e-6.
LOGITS_TOLERANCE = 5e-5


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_checkpoint_has_the_values_that_were_written(case, moe, tmp_path):
    write, options = CASES[case]
    tied = case in ("awq", "mlx 4", "mlx 8", "fp8")
    config, weights = random_model(moe=moe, tied=tied, seed=len(case))
    values = write(tmp_path / "packed", config, weights, **options)
    write_float(tmp_path / "float", config, values)
    found, expected = (qwen3_tg_numpy.load(tmp_path / kind) for kind in ("packed", "float"))
    raw = json.loads((tmp_path / "packed" / "config.json").read_text())
    scheme = find_scheme(tmp_path / "packed", raw)
    stored = read_weights(tmp_path / "packed", found.config.weight_shapes(), scheme)
    assert set(stored) == set(values)
    assert sum(isinstance(weight, Packed) for weight in stored.values()) >= 6
    for name, weight in stored.items():
        assert np.array_equal(to_float32(weight), values[name]), name
    error = np.abs(found.logits(IDS) - expected.logits(IDS)).max()
    assert error <= LOGITS_TOLERANCE, f"max abs {error:.1e}"


def test_a_tied_packed_model_ignores_a_stored_head(tmp_path):
    config, weights = random_model(tied=True)
    write_mlx(tmp_path, config, weights)
    expected = qwen3_tg_numpy.load(tmp_path).logits(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    for end in ("weight", "scales", "biases"):
        tensors[f"lm_head.{end}"] = np.zeros_like(tensors[f"model.embed_tokens.{end}"])
    save_file(tensors, tmp_path / "model.safetensors")
    assert np.array_equal(qwen3_tg_numpy.load(tmp_path).logits(IDS), expected)


# --- what is wrong


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ("awq", "must be an object or null, found 'awq'"),
        ({}, "expected quant_method.*found nothing"),
        ({"quant_method": "compressed-tensors"}, "quant_method.*compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method.*bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method.*modelopt"),
        (AWQ | {"version": "gemv"}, "version .*gemv"),
        (AWQ | {"version": "marlin"}, "version .*marlin"),
        (AWQ | {"format": "gemv_fast"}, "format .*gemv_fast"),
        (AWQ | {"bits": 8}, "bits must be 4, found 8"),
        (AWQ | {"zero_point": False}, "zero_point must be True, found False"),
        (AWQ | {"group_size": 0}, "group_size.*0"),
        (AWQ | {"group_size": "128"}, "group_size.*'128'"),
        (GPTQ | {"bits": 5}, "bits must be 2 or 3 or 4 or 8, found 5"),
        (GPTQ | {"bits": 4.0}, "bits .* found 4.0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format .*marlin"),
        (GPTQ | {"format": "bitblas"}, "format .*bitblas"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format .*True"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype .*int16"),
        (GPTQ | {"hyb_act": True}, "hyb_act .*True"),
        (GPTQ | {"group_size": None}, "group_size .*None"),
        (GPTQ | {"dynamic": ["x"]}, "dynamic must be an object"),
        (GPTQ | {"dynamic": {"+:(": {}}}, r"dynamic: \+:\(: not a pattern"),
        (GPTQ | {"dynamic": {".*q_proj": {"bits": 7}}}, r"dynamic: \.\*q_proj: bits .*7"),
        (FP8 | {"weight_block_size": None}, "weight_block_size .*one scale a tensor"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size .*\[128\]"),
        (FP8 | {"fmt": "e5m2"}, "fmt .*e5m2"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme .*static"),
        (MLX | {"mode": "mxfp4"}, "mode .*mxfp4"),
        (MLX | {"bits": 7}, "bits .*7"),
        (MLX | {"group_size": -1}, "group_size .*-1"),
        ({"bits": 4}, "group_size .*None"),
        (MLX | {"model.norm": {"bits": 16}}, "model.norm: bits .*16"),
        (MLX | {"lm_head": {"mode": "nvfp4"}}, "lm_head: mode .*nvfp4"),
    ],
)
def test_a_scheme_that_is_not_computed_is_refused_by_name(block, named):
    with pytest.raises(CheckpointError, match=f"^here:? .*{named}"):
        read_scheme(block, "here")


def test_the_error_names_config_json_and_the_key(tmp_path):
    config, weights = random_model()
    write_awq(tmp_path, config, weights, version="gemv")
    named = r"config\.json: quantization_config: version must be .*'gemm'.*'gemv'"
    with pytest.raises(CheckpointError, match=named):
        qwen3_tg_numpy.load(tmp_path)


def test_wrong_parts_of_packed_matrices_come_in_one_error(tmp_path):
    config, weights = random_model()
    write_gptq(tmp_path, config, weights)
    tensors = load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.self_attn"
    del tensors[f"{module}.q_proj.qzeros"]
    tensors[f"{module}.k_proj.scales"] = tensors[f"{module}.k_proj.scales"][:, :-8].copy()
    tensors[f"{module}.v_proj.scales"] = tensors[f"{module}.v_proj.scales"].view(np.int16)
    tensors[f"{module}.v_proj.scales"] = np.zeros((2, 256), np.int32)
    tensors[f"{module}.o_proj.g_idx"] = tensors[f"{module}.o_proj.g_idx"] - 1
    tensors[f"{module}.o_proj.bias"] = np.zeros(256, np.float32)
    del tensors["model.layers.1.mlp.up_proj.qweight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        qwen3_tg_numpy.load(tmp_path)
    message = str(caught.value)
    assert f"missing {module}.q_proj.qzeros" in message
    assert f"{module}.k_proj.scales: expected shape (2, 256), found (2, 248)" in message
    assert f"{module}.v_proj.scales: expected F32 or F16 or BF16, found I32" in message
    assert f"{module}.o_proj.g_idx: expected groups 0 to 3, found -1 to 2" in message
    assert f"unexpected {module}.o_proj.bias" in message
    assert "missing model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected model.layers.1.mlp.up_proj.scales" in message


def test_bits_that_do_not_fit_the_tensors_are_refused(tmp_path):
    config, weights = random_model()
    write_mlx(tmp_path, config, weights, bits=4)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization"]["bits"] = 8
    file.write_text(json.dumps(raw))
    named = r"model\.embed_tokens\.weight: expected shape \(192, 64\), found \(192, 32\)"
    with pytest.raises(CheckpointError, match=named):
        qwen3_tg_numpy.load(tmp_path)


def test_fp8_without_its_scale_is_refused(tmp_path: Path):
    config, weights = random_model()
    write_fp8(tmp_path, config, weights)
    with (tmp_path / "model.safetensors").open("rb") as file:
        assert b"F8_E4M3" in file.read(20_000)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {key: value.astype(np.float32) for key, value in weights.items()}
    stored[name] = weights[name].astype(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path, json.loads((tmp_path / "config.json").read_text()), stored)
    with pytest.raises(CheckpointError, match=f"{name}: expected .*BF16, found F8_E4M3"):
        qwen3_tg_numpy.load(tmp_path)
