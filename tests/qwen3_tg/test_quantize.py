"""Rounding to GGUF's blocks, the file around them, and the command."""

from __future__ import annotations

import dataclasses
import errno
import json
import lzma
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import qwen3_tg_numpy
from format_writers import random_model, write_float, write_gptq
from format_writers import write_gguf as write_gguf_parts

from qwen3_tg.checkpoint import Checkpoint, open_checkpoint
from qwen3_tg.cli import main
from qwen3_tg.errors import CheckpointError, Qwen3Error, UnsupportedError, UsageError
from qwen3_tg.quantize import blocks, writer
from qwen3_tg.quantize.blocks import dequantise, quantise
from qwen3_tg.quantize.perplexity import perplexity
from qwen3_tg.quantize.types import CHOICES, choose_types
from qwen3_tg.quantize.writer import Report, write_gguf

DATA = Path(__file__).parent.parent / "data"
TINY = Path(__file__).parent.parent.parent / "qwen3_tg" / "tiny"
# Relative RMS error on 1024 x 1024 gaussian weights of seed 0: llama.cpp's own (ggml_quantize_chunk
# of llama-cpp-python 0.3.36, without an importance matrix), and how much more ours may be.
LLAMA_CPP = {
    "Q8_0": 0.00535,
    "Q4_0": 0.08596,
    "Q4_1": 0.07817,
    "Q5_0": 0.04272,
    "Q5_1": 0.03784,
    "IQ4_NL": 0.07610,
    "Q2_K": 0.29669,
    "Q3_K": 0.15092,
    "Q4_K": 0.07129,
    "Q5_K": 0.03611,
    "Q6_K": 0.01775,
    "F32": 0.0,
    "F16": 0.0003,  # half a unit in the last place is 2**-11 at most
    "BF16": 0.0025,
}
AT_MOST = 1.01
MIXED = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]  # llama.cpp's Q6_K layers of 28
ROUNDING = [type for type in blocks.TYPES if type not in blocks.FLOATS]


def relative_error(x: np.ndarray, type: str) -> float:
    return float(np.sqrt(np.square(dequantise(quantise(x, type), type) - x).mean() / (x**2).mean()))


class TestBlocks:
    @pytest.mark.parametrize("type", blocks.TYPES)
    def test_the_error_is_that_of_llama_cpp_or_less(self, type: str) -> None:
        x = np.random.default_rng(0).normal(0, 0.02, (1024, 1024)).astype(np.float32)
        assert relative_error(x, type) <= LLAMA_CPP[type] * AT_MOST

    @pytest.mark.parametrize("type", blocks.TYPES)
    def test_rows_have_whole_blocks_of_bytes(self, type: str) -> None:
        stored = quantise(np.ones((3, 512), dtype=np.float32), type)
        assert stored.shape == (3, blocks.row_bytes(512, type)) and stored.dtype == np.uint8
        assert dequantise(stored, type).shape == (3, 512)

    @pytest.mark.parametrize("type", ROUNDING)
    def test_values_on_the_grid_come_back_exactly(self, type: str) -> None:
        x = on_the_grid(type, np.random.default_rng(1))
        assert np.array_equal(dequantise(quantise(x, type), type), x)

    @pytest.mark.parametrize("type", blocks.TYPES)
    def test_zeros_stay_zeros(self, type: str) -> None:
        x = np.zeros((2, 512), dtype=np.float32)
        x[1, 256:] = np.random.default_rng(2).normal(size=256)  # a block of zeros beside others
        found = dequantise(quantise(x, type), type)
        assert not found[0].any() and not found[1, :256].any()

    @pytest.mark.parametrize("type", blocks.TYPES)
    @pytest.mark.parametrize("value", [0.37, -0.37])
    def test_constant_rows_are_kept_to_the_last_places_of_a_scale(
        self, type: str, value: float
    ) -> None:
        x = np.full((1, 512), value, dtype=np.float32)
        assert np.abs(dequantise(quantise(x, type), type) - x).max() <= abs(value) * 2**-8

    @pytest.mark.parametrize("type", ROUNDING)
    def test_the_size_of_the_weights_does_not_matter(self, type: str) -> None:
        x = np.random.default_rng(3).normal(size=(8, 512)).astype(np.float32)
        assert np.array_equal(
            dequantise(quantise(x * 1024, type), type), dequantise(quantise(x, type), type) * 1024
        )

    @pytest.mark.parametrize("type", ROUNDING)
    @pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-9])
    def test_weights_below_every_scale_become_zeros_or_come_close(
        self, type: str, size: float
    ) -> None:
        x = (np.random.default_rng(4).normal(size=(4, 256)) * size).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = dequantise(quantise(x, type), type)
        assert np.isfinite(found).all() and np.abs(found).max() <= 5 * size + 1e-5

    @pytest.mark.parametrize("type", ROUNDING)
    def test_weights_beyond_every_scale_show(self, type: str) -> None:
        x = np.random.default_rng(5).normal(size=(2, 256)).astype(np.float32) * np.float32(1e30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not np.isfinite(dequantise(quantise(x, type), type)).all()

    @pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
    def test_one_outlier_does_not_spoil_other_blocks(self, type: str) -> None:
        x = np.random.default_rng(6).normal(size=(1, 512)).astype(np.float32)
        alone = dequantise(quantise(x, type), type)[0, 256:]
        x[0, 3] = 1e4
        found = dequantise(quantise(x, type), type)
        assert np.array_equal(found[0, 256:], alone)
        assert abs(found[0, 3] - 1e4) <= 1e4 * 0.02


def on_the_grid(type: str, rng: np.random.Generator, n: int = 64) -> np.ndarray:
    """Blocks of values that the type can hold, each group reaching the ends of its grid."""
    d = np.float32(2**-9) * rng.integers(1, 9, (n, 1)).astype(np.float32)

    def codes(low: int, high: int, groups: int, size: int, ends: list[int]) -> np.ndarray:
        q = rng.integers(low, high + 1, (n, groups, size))
        q[..., : len(ends)] = ends
        return rng.permuted(q, axis=-1).astype(np.float32)

    def scales(low: int, high: int, groups: int, end: int) -> np.ndarray:
        s = rng.integers(low, high + 1, (n, groups))
        s[:, -1] = end
        return rng.permuted(s, axis=-1).astype(np.float32)

    if type in ("Q2_K", "Q4_K", "Q5_K"):
        groups, top, most = {"Q2_K": (16, 3, 15), "Q4_K": (8, 15, 63), "Q5_K": (8, 31, 63)}[type]
        q = codes(0, top, groups, 256 // groups, [0, top])
        scale, least = scales(1, most, groups, most), scales(0, most, groups, most)
        x = (d * scale)[..., None] * q - (2 * d * least)[..., None]
    elif type in ("Q3_K", "Q6_K"):
        low, least = {"Q3_K": (-4, -32), "Q6_K": (-32, -128)}[type]
        q = codes(low, -low - 1, 16, 16, [low])
        x = (d * scales(least, -least - 1, 16, least))[..., None] * q
    elif type == "IQ4_NL":
        x = d * blocks.IQ4_NL_TABLE[codes(0, 15, 1, 32, [0])[:, 0].astype(int)]
    elif type in ("Q4_1", "Q5_1"):
        top = 15 if type == "Q4_1" else 31
        x = d * codes(0, top, 1, 32, [0, top])[:, 0] - 3 * d
    else:
        low = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -127}[type]
        x = d * codes(low + 1, -low - 1, 1, 32, [low])[:, 0]
    return x.reshape(n, -1).astype(np.float32)


class TestTypes:
    def chosen(
        self, tmp_path: Path, choice: str, embeddings: str | None = None, **model: object
    ) -> tuple[dict[str, str], list[str]]:
        checkpoint = make(tmp_path / "m", **model)
        layers = checkpoint.config.num_hidden_layers
        tensors, notes = choose_types(checkpoint.weights, choice, embeddings, layers)
        return {tensor.gguf_name: tensor.type for tensor in tensors}, notes

    def test_a_plain_type_is_that_of_all_matrices_but_the_output(self, tmp_path: Path) -> None:
        types, notes = self.chosen(tmp_path, "q4_k")
        assert types.pop("output.weight") == "Q6_K" and notes == []
        norms = {name for name in types if "norm" in name}
        assert {types[name] for name in norms} == {"F32"}
        assert {types[name] for name in set(types) - norms} == {"Q4_K"}

    def test_a_tied_embedding_is_the_output_too(self, tmp_path: Path) -> None:
        types, _ = self.chosen(tmp_path, "q4_0", tied=True)
        assert types["token_embd.weight"] == "Q6_K" and "output.weight" not in types

    @pytest.mark.parametrize("choice", ["q8_0", "f16", "bf16", "f32"])
    def test_an_output_is_never_stored_in_less_than_the_rest(
        self, tmp_path: Path, choice: str
    ) -> None:
        types, _ = self.chosen(tmp_path, choice)
        assert types["output.weight"] == types["blk.0.attn_q.weight"] == choice.upper()

    def test_embeddings_may_have_a_type_of_their_own(self, tmp_path: Path) -> None:
        types, _ = self.chosen(tmp_path, "q4_k_m", embeddings="q8_0")
        assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"

    @pytest.mark.parametrize(("choice", "base"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
    def test_the_mixes_are_those_of_llama_cpp(self, tmp_path: Path, choice: str, base: str) -> None:
        types, _ = self.chosen(
            tmp_path, choice, num_hidden_layers=28, intermediate_size=256, num_attention_heads=2
        )
        for kind in ("attn_v", "ffn_down"):
            found = [types[f"blk.{layer}.{kind}.weight"] for layer in range(28)]
            assert found == ["Q6_K" if layer in MIXED else base for layer in range(28)]
        assert {types[f"blk.{layer}.attn_k.weight"] for layer in range(28)} == {base}

    def test_routers_are_kept_and_experts_follow_the_mix(self, tmp_path: Path) -> None:
        types, _ = self.chosen(tmp_path, "q4_k_m", moe=True)
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"
        assert types["blk.1.ffn_down_exps.weight"] == "Q6_K"
        assert types["blk.1.ffn_up_exps.weight"] == "Q4_K"

    @pytest.mark.parametrize(
        ("choice", "instead"),
        [("q4_k", "Q5_0"), ("q5_k", "Q5_1"), ("q6_k", "Q8_0"), ("q3_k", "IQ4_NL")],
    )
    def test_rows_that_are_no_whole_blocks_get_the_next_type(
        self, tmp_path: Path, choice: str, instead: str
    ) -> None:
        types, notes = self.chosen(tmp_path, choice, intermediate_size=320)
        assert types["blk.0.ffn_down.weight"] == instead
        assert notes == [
            f"ffn_down: rows of 320 are no whole blocks of {choice.upper()} (256): "
            f"{instead} instead"
        ]

    def test_rows_that_fit_no_block_are_kept_in_16_bits(self, tmp_path: Path) -> None:
        types, notes = self.chosen(tmp_path, "q4_k", intermediate_size=300)
        assert types["blk.0.ffn_down.weight"] == "F16" and "F16 instead" in notes[0]


def make(path: Path, dtype: str = "bfloat16", shards: int = 1, **model: object) -> Checkpoint:
    """A small float checkpoint, opened."""
    config, weights = random_model(**model)
    write_float(path, config, weights, dtype, shards)
    return open_checkpoint(str(path))


def with_tiny_texts(path: Path, **model: object) -> Checkpoint:
    make(path, vocab_size=800, **model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, path)
    return open_checkpoint(str(path))


def change(checkpoint: Checkpoint, name: str, value: float) -> Checkpoint:
    """One weight of a tensor set to a value."""
    stored = checkpoint.weights[name]
    data = np.array(stored.arrays["data"])
    data.flat[17] = value
    weights = dict(checkpoint.weights) | {name: dataclasses.replace(stored, arrays={"data": data})}
    return dataclasses.replace(checkpoint, weights=weights)


class TestFile:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("moe", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_the_reference_computes_the_same_from_f32(
        self, tmp_path: Path, moe: bool, tied: bool, dtype: str
    ) -> None:
        checkpoint = make(tmp_path / "m", dtype, shards=3, moe=moe, tied=tied)
        report = write_gguf(checkpoint, tmp_path / "o.gguf", "f32", "x")
        assert report.error == 0 and report.bits_per_weight == 32
        ids = [3, 1, 4, 1, 5, 9]
        assert np.array_equal(
            qwen3_tg_numpy.load(tmp_path / "o.gguf").logits(ids),
            qwen3_tg_numpy.load(tmp_path / "m").logits(ids),
        )

    @pytest.mark.parametrize("type", list(CHOICES))
    def test_every_type_reads_back_and_reports_its_error(self, tmp_path: Path, type: str) -> None:
        checkpoint = make(tmp_path / "m", moe=type == "q4_k_m")
        report = write_gguf(checkpoint, tmp_path / "o.gguf", type, "x")
        assert report.bytes_after == (tmp_path / "o.gguf").stat().st_size
        read = open_checkpoint(str(tmp_path / "o.gguf"))
        assert read.config.weight_shapes() == checkpoint.config.weight_shapes()
        found = {t.name: t for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
        changes: dict[tuple[str, str], list[np.ndarray]] = {}
        values: dict[tuple[str, str], list[np.ndarray]] = {}
        tensors, _ = choose_types(checkpoint.weights, type, None, 2)
        for tensor in tensors:
            arrays = (
                [e.arrays["data"] for e in tensor.stored.experts]
                if "_exps" in tensor.kind
                else [tensor.stored.arrays["data"]]
            )
            x = (np.stack(arrays).astype(np.uint32) << 16).view(np.float32)
            stored = found[tensor.gguf_name]
            y = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(x.shape)
            changes.setdefault((tensor.kind, tensor.type), []).append((y - x).ravel())
            values.setdefault((tensor.kind, tensor.type), []).append(x.ravel())
        assert {(cost.kind, cost.type) for cost in report.costs} == set(values)
        for cost in report.costs:
            x = np.concatenate(values[cost.kind, cost.type]).astype(np.float64)
            y = np.concatenate(changes[cost.kind, cost.type]).astype(np.float64)
            assert cost.weights == x.size
            assert cost.error == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-5)

    def test_the_keys_say_what_the_model_is(self, tmp_path: Path) -> None:
        checkpoint = with_tiny_texts(tmp_path / "m", moe=True)
        write_gguf(checkpoint, tmp_path / "o.gguf", "q8_0", "My model")
        reader = gguf.GGUFReader(tmp_path / "o.gguf")
        keys = {name: field.contents() for name, field in reader.fields.items()}
        expected = {
            "general.architecture": "qwen3moe",
            "general.name": "My model",
            "general.file_type": 7,
            "general.quantization_version": 2,
            "general.alignment": 32,
            "qwen3moe.block_count": 2,
            "qwen3moe.context_length": 128,
            "qwen3moe.embedding_length": 256,
            "qwen3moe.feed_forward_length": 512,
            "qwen3moe.attention.head_count": 4,
            "qwen3moe.attention.head_count_kv": 2,
            "qwen3moe.attention.key_length": 128,
            "qwen3moe.attention.value_length": 128,
            "qwen3moe.rope.freq_base": 1e6,
            "qwen3moe.expert_count": 6,
            "qwen3moe.expert_used_count": 2,
            "qwen3moe.expert_feed_forward_length": 256,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.eos_token_id": 770,
            "tokenizer.ggml.padding_token_id": 768,
            "tokenizer.ggml.bos_token_id": 768,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": (TINY / "chat_template.jinja").read_text(),
        }
        assert {key: keys[key] for key in expected} == expected
        assert keys["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        raw = json.loads((TINY / "tokenizer.json").read_text())
        tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
        assert len(tokens) == len(types) == 800
        assert {tokens[id]: id for id in range(768)} == raw["model"]["vocab"]
        assert set(types[:768]) == {1} and tokens[768:771] == [
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
        assert (types[770], tokens[799], types[799]) == (3, "[PAD799]", 5)
        assert types[tokens.index("<think>")] == 4, "added, but not special"
        assert keys["tokenizer.ggml.merges"] == [" ".join(m) for m in raw["model"]["merges"]]
        assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)

    def test_the_real_tokenizer_comes_back(self, tmp_path: Path) -> None:
        from qwen3_tg.tokenizer import Tokenizer

        make(tmp_path / "m", vocab_size=151936, hidden_size=32, num_hidden_layers=1)
        with lzma.open(DATA / "tokenizer.json.xz") as file:
            (tmp_path / "m" / "tokenizer.json").write_bytes(file.read())
        report = write_gguf(open_checkpoint(str(tmp_path / "m")), tmp_path / "o.gguf", "q8_0", "x")
        assert report.notes == []
        read = open_checkpoint(str(tmp_path / "o.gguf"))
        assert read.tokenizer is not None
        before, after = Tokenizer(tmp_path / "m" / "tokenizer.json"), Tokenizer(read.tokenizer)
        for text in ("Größe 日本語 🙂 don't  12\n\n", "<|im_start|>user\n<think>"):
            assert after.encode(text) == before.encode(text)

    def test_yarn_is_kept(self, tmp_path: Path) -> None:
        rope = {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
            "beta_fast": 24.0,
        }
        checkpoint = make(tmp_path / "m", rope_scaling=rope)
        write_gguf(checkpoint, tmp_path / "o.gguf", "f32", "x")
        read = open_checkpoint(str(tmp_path / "o.gguf")).config
        assert read.yarn and checkpoint.config.yarn
        assert read.yarn.attention_factor == pytest.approx(1.25, rel=1e-6)
        kept = dataclasses.replace(read.yarn, attention_factor=1.25)
        assert kept == checkpoint.config.yarn and read.max_position_embeddings == 256

    def test_a_float_gguf_may_be_the_source(self, tmp_path: Path) -> None:
        checkpoint = with_tiny_texts(tmp_path / "m", moe=True)
        write_gguf(checkpoint, tmp_path / "a.gguf", "bf16", "x")
        write_gguf(open_checkpoint(str(tmp_path / "a.gguf")), tmp_path / "b.gguf", "q4_k", "x")
        write_gguf(checkpoint, tmp_path / "c.gguf", "q4_k", "x")
        b, c = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "bc")
        assert [t.name for t in b.tensors] == [t.name for t in c.tensors]
        assert all(
            np.array_equal(x.data, y.data) for x, y in zip(b.tensors, c.tensors, strict=True)
        )
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"):
            assert b.fields[key].contents() == c.fields[key].contents()

    def test_without_a_tokenizer_the_user_is_told(self, tmp_path: Path) -> None:
        report = write_gguf(make(tmp_path / "m"), tmp_path / "o.gguf", "q8_0", "x")
        assert "no tokenizer" in report.notes[0] and "llama.cpp" in report.notes[0]

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path: Path) -> None:
        make(tmp_path / "m")
        shutil.copy(TINY / "tokenizer.json", tmp_path / "m")
        with pytest.raises(CheckpointError, match="tokenizer of another model"):
            write_gguf(open_checkpoint(str(tmp_path / "m")), tmp_path / "o.gguf", "q8_0", "x")

    def test_a_damaged_tokenizer_is_refused(self, tmp_path: Path) -> None:
        checkpoint = dataclasses.replace(make(tmp_path / "m"), tokenizer='{"model": 3}')
        with pytest.raises(CheckpointError, match="tokenizer"):
            write_gguf(checkpoint, tmp_path / "o.gguf", "q8_0", "x")

    def test_what_gguf_cannot_say_is_refused_by_name(self, tmp_path: Path) -> None:
        for sizes, name in (
            ({"norm_topk_prob": False}, "norm_topk_prob"),
            ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ):
            checkpoint = make(tmp_path / name, moe=True)
            sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
            config = dataclasses.replace(checkpoint.config, **sizes)
            with pytest.raises(UnsupportedError, match=name):
                write_gguf(
                    dataclasses.replace(checkpoint, config=config), tmp_path / "o.gguf", "q8_0", "x"
                )

    def test_a_quantised_checkpoint_is_refused(self, tmp_path: Path) -> None:
        config, weights = random_model()
        write_gptq(tmp_path / "m", config, weights)
        for type in ("q8_0", "f32"):
            with pytest.raises(UnsupportedError, match=r"quantised already \(GPTQ\)"):
                write_gguf(open_checkpoint(str(tmp_path / "m")), tmp_path / "o.gguf", type, "x")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_what_is_not_finite_is_refused_by_the_name_of_its_tensor(
        self, tmp_path: Path, name: str, value: float
    ) -> None:
        checkpoint = change(make(tmp_path / "m", "float32"), name, value)
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            write_gguf(checkpoint, tmp_path / "o.gguf", "q4_k", "x")
        assert [file.name for file in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize("type", ["q4_k", "q8_0", "f16", "iq4_nl"])
    def test_what_a_type_cannot_hold_is_refused(self, tmp_path: Path, type: str) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        checkpoint = change(make(tmp_path / "m", "float32"), name, 1e30)
        with pytest.raises(CheckpointError, match=f"{name} holds values up to 1e[+]30.*bf16"):
            write_gguf(checkpoint, tmp_path / "o.gguf", type, "x")
        write_gguf(checkpoint, tmp_path / "o.gguf", "bf16", "x")

    def test_no_tensor_is_ever_held_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "_cores", lambda: 2)
        checkpoint = make(tmp_path / "m", vocab_size=2**16, num_hidden_layers=1, tied=True)
        tensor_bytes = 2**16 * 256 * 4
        tracemalloc.start()
        try:
            write_gguf(checkpoint, tmp_path / "o.gguf", "q4_0", "x")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < tensor_bytes / 4

    def test_progress_counts_the_bytes_of_the_checkpoint(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        report = write_gguf(
            make(tmp_path / "m"),
            tmp_path / "o.gguf",
            "q8_0",
            "x",
            on_progress=lambda done, total: seen.append((done, total)),
        )
        assert seen[-1] == (report.bytes_before, report.bytes_before)
        assert seen == sorted(seen)

    def test_the_order_of_threads_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "_VALUES_AT_ONCE", 4096)
        files = []
        for cores in (1, 8):
            monkeypatch.setattr(writer, "_cores", lambda n=cores: n)
            write_gguf(make(tmp_path / "m"), tmp_path / f"{cores}.gguf", "q4_k_m", "x")
            files.append((tmp_path / f"{cores}.gguf").read_bytes())
        assert files[0] == files[1]


class TestPlace:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Report]:
        checkpoint = make(tmp_path / "m")
        return lambda out, **more: write_gguf(checkpoint, Path(out), "q8_0", "x", **more)

    def test_an_existing_file_is_kept_unless_told_otherwise(
        self, tmp_path: Path, write: Callable[..., Report]
    ) -> None:
        out = tmp_path / "o.gguf"
        out.write_bytes(b"precious")
        with pytest.raises(UsageError, match="exists already; --force"):
            write(out)
        assert out.read_bytes() == b"precious"
        write(out, overwrite=True)
        assert out.read_bytes()[:4] == b"GGUF"

    def test_places_that_cannot_be_meant_are_refused(
        self, tmp_path: Path, write: Callable[..., Report]
    ) -> None:
        for out, why in (
            (tmp_path / "m" / "o.gguf", "lies in the checkpoint itself"),
            (tmp_path, "is a directory"),
            (tmp_path / "no" / "o.gguf", "no such directory"),
            (Path("/dev/null"), "not a regular file"),
        ):
            with pytest.raises(UsageError, match=why):
                write(out, overwrite=True)

    def test_the_source_itself_is_never_overwritten(
        self, tmp_path: Path, write: Callable[..., Report]
    ) -> None:
        write(tmp_path / "a.gguf")
        write_gguf(open_checkpoint(str(tmp_path / "m")), tmp_path / "f.gguf", "f32", "x")
        source = open_checkpoint(str(tmp_path / "f.gguf"))
        (tmp_path / "link.gguf").symlink_to(tmp_path / "f.gguf")
        for name in ("f.gguf", "link.gguf"):
            with pytest.raises(UsageError, match="is the checkpoint itself"):
                write_gguf(source, tmp_path / name, "q8_0", "x", overwrite=True)

    def test_no_part_of_a_split_source_is_overwritten(self, tmp_path: Path) -> None:
        config, weights = random_model()
        write_gguf_parts(tmp_path / "s.gguf", config, weights, split=2)
        source = open_checkpoint(str(tmp_path / "s-00001-of-00002.gguf"))
        for name in ("s-00001-of-00002.gguf", "s-00002-of-00002.gguf"):
            with pytest.raises(UsageError, match="is the checkpoint itself"):
                write_gguf(source, tmp_path / name, "q8_0", "x", overwrite=True)
        write_gguf(source, tmp_path / "s.gguf", "q8_0", "x")

    def test_a_full_disk_is_seen_before(
        self, tmp_path: Path, write: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        with pytest.raises(Qwen3Error, match=r"0\.00 GB are free"):
            write(tmp_path / "o.gguf")
        assert [file.name for file in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize(
        "problem", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
    )
    def test_what_stops_it_leaves_nothing_behind(
        self, tmp_path: Path, write: Callable[..., Report], problem: BaseException
    ) -> None:
        def stop(done: int, total: int) -> None:
            assert (tmp_path / "o.gguf.part").is_file()
            if done > total / 2:
                raise problem

        expected = Qwen3Error if isinstance(problem, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            write(tmp_path / "o.gguf", on_progress=stop)
        assert [file.name for file in tmp_path.iterdir()] == ["m"]

    def test_two_runs_do_not_write_the_same_file(
        self, tmp_path: Path, write: Callable[..., Report]
    ) -> None:
        (tmp_path / "o.gguf.part").touch()
        with pytest.raises(UsageError, match="another run is writing it"):
            write(tmp_path / "o.gguf")
        write(tmp_path / "o.gguf", overwrite=True)
        assert not (tmp_path / "o.gguf.part").exists()


class FakeModel:
    """Logits of a table, by the id and its position in the window."""

    def __init__(self, vocab_size: int):
        self._table = np.random.default_rng(0).normal(0, 3, (64, vocab_size, vocab_size))

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array([self._table[i, id] for i, id in enumerate(ids)], dtype=np.float32)


class TestPerplexity:
    @pytest.mark.parametrize("count", [2, 7, 10, 11, 23])
    def test_it_is_the_inverse_geometric_mean_of_the_probabilities(self, count: int) -> None:
        model, window = FakeModel(20), 10
        ids = np.random.default_rng(count).integers(0, 20, count).tolist()
        probabilities = []
        for i in range(count):
            if i % window:  # the first of a window has nothing before it
                start = i // window * window
                row = model.logits(ids[start:i])[-1].astype(np.float64)
                probabilities.append(np.exp(row[ids[i]]) / np.exp(row).sum())
        expected = np.prod(probabilities) ** (-1 / len(probabilities))
        assert perplexity(model, ids, window) == pytest.approx(expected, rel=1e-6)

    def test_even_chances_give_the_number_of_tokens(self) -> None:
        class Even:
            def logits(self, ids: list[int]) -> np.ndarray:
                return np.full((len(ids), 50), 1e4, dtype=np.float32)

        assert perplexity(Even(), list(range(50)) * 3, 130) == pytest.approx(50)

    def test_too_short_a_text_is_refused(self) -> None:
        with pytest.raises(UsageError, match="at least two"):
            perplexity(FakeModel(20), [3], 10)


class TestCommand:
    def test_it_says_what_it_cost(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quantize", "tiny", str(tmp_path / "o.gguf"), "--type", "q8_0"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and "attn_q          Q8_0          81920   0.54%" in out
        assert "8.54 bits a weight" in out and "1087168 weights" in out
        assert open_checkpoint(str(tmp_path / "o.gguf")).config == open_checkpoint("tiny").config

    def test_programs_get_json_and_the_perplexity_of_a_text(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = tmp_path / "t.txt"
        text.write_text("What is 37 + 85?\n7+5=12, so 122.\n")
        arguments = ["quantize", "tiny", str(tmp_path / "o.gguf"), "--type", "Q8_0", "--json"]
        assert main([*arguments, "--text", str(text)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["type"] == "q8_0" and 0 < found["error"] < 0.01
        assert {"kind": "attn_norm", "type": "F32", "weights": 640, "error": 0.0} in found["costs"]
        before, after = found["perplexity"]["before"], found["perplexity"]["after"]
        assert 1 < before == pytest.approx(after, rel=0.1)

    def test_notes_go_to_stderr(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quantize", "tiny", str(tmp_path / "o.gguf")]) == 0
        out, err = capsys.readouterr()
        assert "Q5_0 instead" in err and "instead" not in out

    def test_wrong_calls_end_in_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "o.gguf"
        for arguments, why in (
            ([], "required"),
            (["tiny", str(out), "--type", "q9"], "invalid choice"),
            (["tiny", str(out), "--embeddings", "q4_k_m"], "invalid choice"),
            (["tiny", str(out), "--text", str(tmp_path / "no")], "not readable"),
            (["tiny", str(tmp_path)], "is a directory"),
        ):
            assert main(["quantize", *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and why in line
        assert list(tmp_path.iterdir()) == []

    def test_it_needs_no_tinygrad(self, tmp_path: Path) -> None:
        code = (
            "import sys; from qwen3_tg.cli import main; "
            f"main(['quantize', 'tiny', {str(tmp_path / 'o.gguf')!r}]); "
            "sys.exit('tinygrad' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
