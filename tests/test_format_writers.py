"""The writers of checkpoint formats, judged by decoding each stored number by the written formula,
one by one, and by the gguf library's reader."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from format_writers import (
    BLOCK_TYPES,
    Config,
    Weights,
    gguf_name,
    gguf_parts,
    is_linear,
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)
from format_writers.packed import AWQ_ORDER, pack_bits

SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3.down_proj"
# The largest root mean square error over that of the weights: measured, and a fifth more. Table
# types hold random blocks of the right size: sqrt(2).
BLOCK_ERRORS = {
    "Q8_0": 0.0065,
    "Q4_0": 0.105,
    "Q4_1": 0.095,
    "Q5_0": 0.052,
    "Q5_1": 0.046,
    "Q2_K": 0.4,
    "Q3_K": 0.19,
    "Q4_K": 0.095,
    "Q5_K": 0.046,
    "Q6_K": 0.023,
    "IQ4_NL": 0.097,
    "IQ4_XS": 0.097,
}


@pytest.fixture(scope="module")
def dense() -> tuple[Config, Weights]:
    return random_model(moe=False, tied=False, seed=5, **SMALL | {"intermediate_size": 256})


@pytest.fixture(scope="module")
def moe() -> tuple[Config, Weights]:
    return random_model(moe=True, tied=False, seed=6, **SMALL | {"num_experts": 4})


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the directory; BF16 as float32, F8_E4M3 as its bytes."""
    dtypes = {
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "I32": "<u4",
        "U32": "<u4",
        "F8_E4M3": "u1",
    }
    tensors = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]
        for name, info in header.items():
            start, end = (8 + length + offset for offset in info["data_offsets"])
            value = np.frombuffer(data[start:end], dtypes[info["dtype"]]).reshape(info["shape"])
            if info["dtype"] == "BF16":
                value = (value.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = value
    return tensors


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def block_of_config(folder: Path, key: str = "quantization_config") -> dict[str, Any]:
    block: dict[str, Any] = json.loads((folder / "config.json").read_text())[key]
    return block


class TestWords:
    """The worked examples of each format's description."""

    def test_nibbles_of_an_awq_word_are_interleaved(self) -> None:
        q = np.array([1, 2, 3, 4, 5, 6, 7, 8])[list(AWQ_ORDER)]
        assert pack_bits(q, 4).tolist() == [0x86427531]

    def test_gptq_and_mlx_words_have_the_first_value_lowest(self) -> None:
        assert pack_bits(np.array([8, 9, 10, 7, 0, 15, 3, 8]), 4).tolist() == [0x83F07A98]

    def test_other_widths_cross_the_borders_of_words(self) -> None:
        six = np.array([1, 2, 3, 4] * 4)
        assert pack_bits(six, 6).tobytes() == bytes.fromhex("813010") * 4
        three = np.array([1, 2, 3, 4, 5, 6, 7, 0] * 4)
        assert pack_bits(three, 3).tobytes() == bytes.fromhex("D1581F") * 4


def test_the_models_are_hard_to_get_right(dense: tuple[Config, Weights]) -> None:
    config, w = dense
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    for name in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        norm = w[f"model.layers.0.{name}.weight"]
        assert norm.min() < 0
        assert np.abs(norm - 1).mean() > 0.1
    q_norm, k_norm = (w[f"model.layers.0.self_attn.{x}_norm.weight"] for x in "qk")
    assert np.abs(q_norm - k_norm).mean() > 0.1


def test_a_key_that_no_config_has_is_refused() -> None:
    with pytest.raises(KeyError, match="hidden_sizes"):
        random_model(hidden_sizes=8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shards_hold_together_what_one_file_does(
    tmp_path: Path, dense: tuple[Config, Weights], dtype: str
) -> None:
    config, w = dense
    oracle = write_float(tmp_path / "one", config, w, dtype)
    write_float(tmp_path / "three", config, w, dtype, shards=3)
    one, three = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "three")
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert set(one) == set(three) == set(oracle) == set(w)
    for name, value in one.items():
        assert np.array_equal(value, three[name])
        assert np.array_equal(value.astype(np.float32), oracle[name])
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(w)


@pytest.mark.parametrize("group_size", [128, -1])
def test_awq_is_what_its_formula_says(
    tmp_path: Path, moe: tuple[Config, Weights], group_size: int
) -> None:
    config, w = moe
    oracle = write_awq(tmp_path, config, w, group_size, skip=["k_proj"])
    t = stored_tensors(tmp_path)
    column_of_shift = [0, 2, 4, 6, 1, 3, 5, 7]
    for module in (Q_PROJ, EXPERT):
        O, I = w[f"{module}.weight"].shape
        size = I if group_size == -1 else group_size
        assert t[f"{module}.qweight"].shape == (I, O // 8)
        assert t[f"{module}.qzeros"].shape == (I // size, O // 8)
        found = np.empty((O, I), dtype=np.float32)
        for i in range(I):
            for k in range(O // 8):
                q, z = int(t[f"{module}.qweight"][i, k]), int(t[f"{module}.qzeros"][i // size, k])
                for n in range(8):
                    o = 8 * k + column_of_shift[n]
                    scale = np.float32(t[f"{module}.scales"][i // size, o])
                    found[o, i] = ((q >> 4 * n & 15) - (z >> 4 * n & 15)) * scale
        assert np.array_equal(found, oracle[f"{module}.weight"])
        assert f"{module}.weight" not in t
    kept = {name for name in t if name.endswith(".weight")}
    assert kept == {name for name in w if not is_linear(name) or "k_proj" in name}
    assert block_of_config(tmp_path)["modules_to_not_convert"] == ["k_proj"]
    assert set(oracle) == set(w)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8},
        {"sym": False},
        {"act_order": True, "sym": False},
        {"v2": True, "sym": False, "dtype": "bfloat16"},
        {"bits": 2},
        {"bits": 3, "act_order": True},
        {"bits": 4, "with_g_idx": False, "group_size": 32},
    ],
    ids=str,
)
def test_gptq_is_what_its_formula_says(
    tmp_path: Path, moe: tuple[Config, Weights], options: dict[str, Any]
) -> None:
    config, w = moe
    oracle = write_gptq(tmp_path, config, w, **options)
    bits, v2 = options.get("bits", 4), options.get("v2", False)
    size = options.get("group_size", 128)
    t = stored_tensors(tmp_path)

    def value(words: np.ndarray, index: int) -> int:
        """A value of a bit stream: it may lie in two words."""
        low, shift = divmod(index * bits, 32)
        both = int(words[low]) | (int(words[low + 1]) << 32 if low + 1 < len(words) else 0)
        return both >> shift & (2**bits - 1)

    for module in (Q_PROJ, EXPERT):
        O, I = w[f"{module}.weight"].shape
        qweight, qzeros = t[f"{module}.qweight"], t[f"{module}.qzeros"]
        assert qweight.shape == (I * bits // 32, O)
        assert qzeros.shape == (I // size, O * bits // 32)
        g_idx = t.get(f"{module}.g_idx", np.arange(I) // size)
        found = np.empty((64, I), dtype=np.float32)  # of O
        for o in range(len(found)):
            words = qweight[:, o]
            for i in range(I):
                z = value(qzeros[g_idx[i]], o) + (0 if v2 else 1)
                found[o, i] = (value(words, i) - z) * np.float32(t[f"{module}.scales"][g_idx[i], o])
        assert np.array_equal(found, oracle[f"{module}.weight"][: len(found)])
    if options.get("sym", True):
        word = {4: 0x77777777, 8: 0x7F7F7F7F}.get(bits)
        assert word is None or set(qzeros.flat) == {word}
    elif "act_order" not in options:  # zero points at the ends of what can be stored
        assert [value(qzeros[0], o) for o in (0, 1)] == [15, 0]
    if options.get("act_order"):
        assert np.any(np.diff(g_idx.astype(int)) < 0)
    assert {name for name in t if name.endswith(".weight")} == {n for n in w if not is_linear(n)}


def test_gptq_settings_differ_by_module(tmp_path: Path, dense: tuple[Config, Weights]) -> None:
    config, w = dense
    dynamic: dict[str, dict[str, Any]] = {r"-:.*k_proj": {}, r"+:.*down_proj": {"bits": 8}}
    write_gptq(tmp_path, config, w, dynamic=dynamic, lm_head=True, separate_config=True)
    t = stored_tensors(tmp_path)
    assert "model.layers.0.self_attn.k_proj.weight" in t
    assert t["model.layers.0.mlp.down_proj.qweight"].shape == (256 * 8 // 32, 256)
    assert t["model.layers.0.mlp.up_proj.qweight"].shape == (256 * 4 // 32, 256)
    assert "lm_head.qweight" in t
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    block = json.loads((tmp_path / "quantize_config.json").read_text())
    assert block["dynamic"] == dynamic
    assert block["lm_head"] is True


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_fp8_is_what_its_formula_says_with_partial_blocks(tmp_path: Path, scale_dtype: str) -> None:
    sizes = SMALL | {"hidden_size": 192, "moe_intermediate_size": 320, "num_experts": 4}
    config, w = random_model(moe=True, seed=7, **sizes)
    oracle = write_fp8(tmp_path, config, w, scale_dtype, skip=["model.layers.0.self_attn.k_proj"])
    t = stored_tensors(tmp_path)

    def e4m3(byte: int) -> float:
        sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
        if exponent == 0:
            return sign * mantissa / 8 * 2.0**-6
        return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)

    numbers = [np.float32(e4m3(b)) if b & 0x7F != 0x7F else np.nan for b in range(256)]
    assert [e4m3(b) for b in (0x3A, 0xC4, 0x01, 0x7E)] == [1.25, -3, 2**-9, 448]
    for module in (Q_PROJ, EXPERT):
        O, I = w[f"{module}.weight"].shape
        weight, scale = t[f"{module}.weight"], t[f"{module}.weight_scale_inv"]
        assert weight.dtype == np.uint8
        assert scale.shape == (-(-O // 128), -(-I // 128))
        found = np.empty((O, I), dtype=np.float32)
        for o in range(O):
            for i in range(I):
                factor = np.float32(scale[o // 128, i // 128])
                found[o, i] = numbers[weight[o, i]] * factor
        assert np.array_equal(found, oracle[f"{module}.weight"])
        assert relative_error(found, w[f"{module}.weight"]) < 0.032  # 3 bits of mantissa
    assert "model.layers.0.self_attn.k_proj.weight_scale_inv" not in t
    kept = block_of_config(tmp_path)["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.gate"} < set(kept)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [64, 32])
def test_mlx_is_what_its_formula_says(
    tmp_path: Path, moe: tuple[Config, Weights], bits: int, group_size: int
) -> None:
    config, w = moe
    router = "model.layers.0.mlp.gate"
    overrides = {router: {"bits": 8, "group_size": 64}, "model.layers.0.self_attn.k_proj": False}
    oracle = write_mlx(tmp_path, config, w, bits, group_size, overrides)
    t = stored_tensors(tmp_path)

    def decoded(
        module: str, expert: int | tuple[()], b: int, size: int, rows: int = 24
    ) -> np.ndarray:
        words, scales, biases = (t[f"{module}.{x}"][expert] for x in ("weight", "scales", "biases"))
        I = words.shape[1] * 32 // b
        assert scales.shape[1] * size == I
        found = np.empty((min(rows, len(words)), I), dtype=np.float32)
        for o in range(len(found)):
            stream = int.from_bytes(words[o].tobytes(), "little")
            for i in range(I):
                q = stream >> i * b & (2**b - 1)
                found[o, i] = np.float32(q) * scales[o, i // size] + biases[o, i // size]
        return found

    everything: tuple[()] = ()
    for module in (Q_PROJ, "model.embed_tokens", "lm_head"):
        found = decoded(module, everything, bits, group_size)
        assert np.array_equal(found, oracle[f"{module}.weight"][: len(found)])
    found = decoded(router, everything, 8, 64)
    assert np.array_equal(found, oracle[f"{router}.weight"])
    found = decoded("model.layers.0.mlp.switch_mlp.down_proj", 3, bits, group_size)
    assert np.array_equal(found, oracle[f"{EXPERT}.weight"][: len(found)])
    assert t[f"{Q_PROJ}.scales"].min() < 0 < t[f"{Q_PROJ}.scales"].max()
    assert "model.layers.0.self_attn.k_proj.scales" not in t
    assert not any(".experts." in name for name in t)
    assert set(oracle) == set(w)
    assert block_of_config(tmp_path) == block_of_config(tmp_path, "quantization")


class TestGguf:
    @pytest.mark.parametrize("type", BLOCK_TYPES)
    def test_blocks_hold_the_weights(
        self, tmp_path: Path, moe: tuple[Config, Weights], type: str
    ) -> None:
        config, w = moe
        path = tmp_path / "m.gguf"
        oracle = write_gguf(path, config, w, type)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        limit = BLOCK_ERRORS.get(type, 1.5)
        for name, W in w.items():
            tensor = read[gguf_name(name)]
            if W.ndim == 1 or name.endswith("mlp.gate.weight"):
                assert tensor.tensor_type.name == "F32"
                assert np.array_equal(oracle[name], W)
                continue
            assert tensor.tensor_type.name == type
            assert tensor.shape[:2].tolist() == [*reversed(W.shape)]
            assert relative_error(oracle[name], W) < limit
            assert np.isfinite(oracle[name]).all()
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expert = int(name.split(".")[5]) if ".experts." in name else ()
            assert np.array_equal(values[expert], oracle[name])

    def test_types_of_tables_use_all_of_their_tables(self, dense: tuple[Config, Weights]) -> None:
        from format_writers import quantise

        W = dense[1][f"{Q_PROJ}.weight"]
        for type in (type for type in BLOCK_TYPES if type not in BLOCK_ERRORS):
            blocks = quantise(W, type)
            assert len(np.unique(blocks)) == 256, type
            other = quantise(W + 1e-3, type)
            assert not np.array_equal(blocks[:, 8:], other[:, 8:]), f"{type}: the same blocks"

    def test_keys_are_those_of_llama_cpp(self, tmp_path: Path, moe: tuple[Config, Weights]) -> None:
        config, w = moe
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        path = tmp_path / "m.gguf"
        write_gguf(path, config | {"rope_scaling": rope}, w, extra_keys={"general.author": "x"})
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        assert values["general.architecture"] == "qwen3moe"
        assert values["qwen3moe.attention.key_length"] == config["head_dim"]
        assert values["qwen3moe.expert_count"] == 4
        assert values["qwen3moe.expert_used_count"] == 2
        assert values["qwen3moe.rope.freq_base"] == 1e6
        assert values["qwen3moe.rope.scaling.type"] == "yarn"
        assert values["qwen3moe.rope.scaling.factor"] == 4
        assert values["qwen3moe.rope.scaling.original_context_length"] == 32
        assert values["general.author"] == "x"
        assert "tokenizer.ggml.tokens" not in values
        assert len(reader.tensors) == 12 + 3  # as llama.cpp counts a mixture layer

    def test_types_and_versions_and_alignment_may_differ(
        self, tmp_path: Path, dense: tuple[Config, Weights]
    ) -> None:
        config, w = dense
        path = tmp_path / "m.gguf"

        def type_of(name: str) -> str:
            return "Q6_K" if "attn_v" in name or name == "output.weight" else "Q4_K"

        write_gguf(path, config, w, type_of, version=2, alignment=64)
        assert path.read_bytes()[:8] == b"GGUF\2\0\0\0"
        reader = gguf.GGUFReader(path)
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types["blk.0.attn_v.weight"] == types["output.weight"] == "Q6_K"
        assert types["blk.0.attn_k.weight"] == "Q4_K"
        assert {tensor.data_offset % 64 for tensor in reader.tensors} == {0}

    def test_a_tied_model_may_come_with_an_output_matrix(self, tmp_path: Path) -> None:
        config, w = random_model(tied=True, **SMALL)

        def type_of(name: str) -> str:
            return "Q6_K" if name == "output.weight" else "Q4_K"

        tied = write_gguf(tmp_path / "tied.gguf", config, w, type_of)
        assert "lm_head.weight" not in tied
        with_output = write_gguf(tmp_path / "m.gguf", config, w, type_of, tied_output=True)
        assert not np.array_equal(
            with_output["lm_head.weight"], with_output["model.embed_tokens.weight"]
        )

    @pytest.mark.parametrize("empty_first_part", [False, True])
    def test_parts_hold_together_what_one_file_does(
        self, tmp_path: Path, dense: tuple[Config, Weights], empty_first_part: bool
    ) -> None:
        config, w = dense
        options = {"split": 3, "empty_first_part": empty_first_part}
        oracle = write_gguf(tmp_path / "m.gguf", config, w, "Q4_K", **options)
        parts = gguf_parts(tmp_path / "m.gguf")
        assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        readers = [gguf.GGUFReader(part) for part in parts]
        assert (len(readers[0].tensors) == 0) == empty_first_part
        for i, reader in enumerate(readers):
            assert reader.fields["split.no"].contents() == i
            assert reader.fields["split.count"].contents() == 3
            assert reader.fields["split.tensors.count"].contents() == len(w)
            assert ("qwen3.block_count" in reader.fields) == (i == 0)
        names = [tensor.name for reader in readers for tensor in reader.tensors]
        assert sorted(names) == sorted(gguf_name(name) for name in oracle)

    def test_the_vocabulary_is_padded_to_the_model(
        self, tmp_path: Path, tokenizer_json: Path
    ) -> None:
        config, w = random_model(**SMALL)
        path = tmp_path / "m.gguf"
        write_gguf(path, config, w, tokenizer=tokenizer_json, chat_template="{{ messages }}")
        values = {n: field.contents() for n, field in gguf.GGUFReader(path).fields.items()}
        tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
        assert tokens[:3] == ["a", "Ġb", "ab"]
        assert tokens[3:8] == ["<|endoftext|>", "<|im_end|>", "<think>", "[PAD6]", "[PAD7]"]
        assert types[:8] == [1, 1, 1, 3, 3, 4, 5, 5]
        assert len(tokens) == len(types) == config["vocab_size"]
        assert values["tokenizer.ggml.merges"] == ["a b", "Ġ b"]
        assert values["tokenizer.ggml.pre"] == "qwen2"
        assert values["tokenizer.ggml.eos_token_id"] == 4
        assert values["tokenizer.ggml.padding_token_id"] == 3
        assert values["tokenizer.chat_template"] == "{{ messages }}"

    @pytest.fixture
    def tokenizer_json(self, tmp_path: Path) -> Path:
        added = [("<|endoftext|>", True), ("<|im_end|>", True), ("<think>", False)]
        raw = {
            "added_tokens": [
                {"id": 3 + i, "content": content, "special": special}
                for i, (content, special) in enumerate(added)
            ],
            "model": {"vocab": {"a": 0, "Ġb": 1, "ab": 2}, "merges": [["a", "b"], "Ġ b"]},
        }
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        return file


def test_the_writers_share_no_code_with_what_they_judge() -> None:
    folder = Path(__file__).parent / "format_writers"
    for file in folder.glob("*.py"):
        assert "qwen3_tg" not in file.read_text(encoding="utf-8"), file.name
