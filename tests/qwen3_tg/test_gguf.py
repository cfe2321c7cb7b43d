"""The reader of GGUF files: exact values, config and tokenizer from the metadata, and one clear
error for each damage."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_writers import gguf_parts, random_model, write_gguf
from gguf_bytes import (
    ARRAY,
    BF16,
    F16,
    Q8_0,
    STRING,
    VOCAB,
    D,
    E,
    F,
    File,
    Raw,
    Tensor,
    small,
    split,
    string,
    write_parts,
)
from text_data import read_data

from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.checkpoint.gguf import Part, checkpoint_of, open_gguf
from qwen3_tg.checkpoint.gguf_header import Header, TensorInfo, read_header
from qwen3_tg.checkpoint.gguf_tokenizer import read_tokenizer
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError, UnsupportedError
from qwen3_tg.tokenizer import Tokenizer

pytest_plugins = ["text_fixtures"]
GATE = "blk.0.ffn_gate.weight"
CASES: dict[str, Any] = read_data("tokenizer_cases.json")


def refused(path: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert message.startswith(str(path.parent))
    return message


def header_of(file: File) -> Header:
    content = file.to_bytes()
    return read_header(io.BytesIO(content), len(content), "x")


# --- what is read ---


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_config_and_values_are_read(tmp_path: Path, moe: bool, tied: bool) -> None:
    file = small(moe, tied)
    checkpoint = open_checkpoint(str(file.write(tmp_path / "m.gguf")))
    assert checkpoint.config == ModelConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        **(
            {
                "num_experts": E,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": F,
                "norm_topk_prob": True,
            }
            if moe
            else {}
        ),
    )
    shapes = checkpoint.config.weight_shapes()
    assert list(checkpoint.weights) == list(shapes)
    for name, stored in checkpoint.weights.items():
        assert (stored.format, stored.shape) == ("float32", shapes[name])
        assert stored.arrays["data"].shape == shapes[name]
        assert not stored.arrays["data"].flags.writeable
    numbers = {t.name: n + 1 for n, t in enumerate(file.tensors)}
    rows = {"model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight"}
    rows |= {"model.embed_tokens.weight": "token_embd.weight"}
    rows |= {"model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight"}
    for name, stored_name in rows.items():
        assert (checkpoint.weights[name].arrays["data"] == numbers[stored_name]).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "IQ2_XS"])
@pytest.mark.parametrize("split", [1, 3])
def test_bytes_are_those_of_the_file(tmp_path: Path, kind: str, split: int) -> None:
    config, weights = random_model(num_hidden_layers=1)
    write_gguf(tmp_path / "m.gguf", config, weights, kind, split=split)
    parts = gguf_parts(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(parts[-1]))
    assert checkpoint.config == ModelConfig.from_dict(config)
    whole = b"".join(part.read_bytes() for part in parts)
    formats = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for name, stored in checkpoint.weights.items():
        (array,) = stored.arrays.values()
        assert not array.flags.writeable
        assert array.tobytes() in whole
        if name.endswith("_proj.weight"):
            assert stored.format == formats.get(kind, kind)
    stored = checkpoint.weights["model.embed_tokens.weight"]
    if kind == "F16":
        expected = weights["model.embed_tokens.weight"].astype(np.float16)
        assert np.array_equal(stored.arrays["data"], expected)
    if kind == "BF16":
        assert stored.arrays["data"].dtype == np.uint16
    if kind == "Q8_0":
        assert stored.arrays["blocks"].dtype == np.uint8
        assert stored.arrays["blocks"].shape == (192, 256 // 32 * 34)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    file = small()
    file.version, file.alignment = version, alignment
    file.keys["general.alignment"] = alignment
    checkpoint = open_gguf(file.place().write(tmp_path / "m.gguf"))
    assert (checkpoint.weights["lm_head.weight"].arrays["data"] == len(file.tensors)).all()


def test_every_type_of_value_is_read() -> None:
    names = "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float32 float64".split()
    numbers = {name: np.dtype(name).type(-2 if name.startswith("int") else 2) for name in names}
    arrays = {f"{name} array": np.array([n, n]) for name, n in numbers.items()}
    others = {"text": "é", "texts": ["a", "", "漢"], "yes": True, "bools": np.array([True, False])}
    found = header_of(File(numbers | arrays | others)).metadata
    assert {key: found[key] for key in numbers} == numbers
    assert type(found["int8"]) is int
    assert type(found["float32"]) is float
    for key in [*arrays, "bools"]:
        assert np.array_equal(found[key], (arrays | others)[key])
    assert found["text"] == "é"
    assert found["texts"] == ["a", "", "漢"]
    assert found["yes"] is True


def test_a_float32_is_the_number_that_was_meant() -> None:
    assert header_of(File({"eps": 1e-6, "temp": 0.6})).metadata == {"eps": 1e-6, "temp": 0.6}


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
def test_a_header_is_read_from_any_file_in_any_pieces(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_tg.checkpoint.gguf_header._CHUNK_BYTES", piece_bytes)
    file = small()
    content = file.to_bytes()
    stream = io.BytesIO(content)
    header = read_header(stream, len(content), "x")
    assert header.data_start == len(content) - len(file.data)
    assert stream.tell() <= header.data_start + piece_bytes
    assert header.tensors[0] == TensorInfo("token_embd.weight", (VOCAB, D), "F32", 0, VOCAB * D * 4)
    assert header.metadata["tokenizer.ggml.tokens"][3] == "<|im_end|>"


def test_headers_alone_give_all_but_the_values(tmp_path: Path) -> None:
    files = split(small(moe=True), 3)
    parts = [Part(f"m-{n + 1:05}-of-00003.gguf", header_of(f)) for n, f in enumerate(files)]
    planned = checkpoint_of(parts, Path("m-00001-of-00003.gguf"))
    whole = open_gguf(write_parts(tmp_path, files)[0])
    assert planned.config == whole.config
    found = {name: (w.format, w.shape, w.device_bytes) for name, w in planned.weights.items()}
    assert found == {n: (w.format, w.shape, w.device_bytes) for n, w in whole.weights.items()}


def test_a_folder_with_one_gguf_model_is_opened(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, split(small(), 2), "Some-Q8_0")
    assert open_checkpoint(str(tmp_path)).path == paths[0]
    small().write(tmp_path / "Other-Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF models.*Other-Q4_K_M\.gguf, Some-Q8"):
        open_checkpoint(str(tmp_path))


def test_a_file_without_the_suffix_is_opened(tmp_path: Path) -> None:
    assert open_checkpoint(str(small().write(tmp_path / "sha256-0a1b"))).config.hidden_size == D


def test_a_part_without_tensors_may_come_first(tmp_path: Path) -> None:
    files = split(small(), 3)
    files[1].tensors += files[0].tensors
    files[0].tensors = []
    for part in write_parts(tmp_path, [file.place() for file in files]):
        assert open_gguf(part).path == part


# --- generation, tokenizer and template ---


def test_generation_settings_are_read(tmp_path: Path) -> None:
    file = small()
    assert open_gguf(file.write(tmp_path / "m.gguf")).generation.eos_token_ids == (3,)
    file.keys |= {
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 2**32 - 1,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": np.int32(5),
        "general.sampling.top_p": 0.8,
        "general.sampling.min_p": 0.1,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.xtc_probability": 0.5,
    }
    found = open_gguf(file.write(tmp_path / "m.gguf")).generation
    assert found.eos_token_ids == (3, 4)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.7, 5, 0.8, 0.1)
    assert found.repetition_penalty == 1.5
    assert found.not_applied == ("xtc_probability 0.5",)


def test_template_and_special_tokens_are_read(tmp_path: Path) -> None:
    checkpoint = open_gguf(small().write(tmp_path / "m.gguf"))
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.special_tokens == {"eos_token": "<|im_end|>"}


def test_token_types_say_which_tokens_are_added_and_special(tmp_path: Path) -> None:
    text = open_gguf(small().write(tmp_path / "m.gguf")).tokenizer
    assert isinstance(text, str)
    tokenizer = Tokenizer(text)
    assert tokenizer.added_tokens == {"<|im_end|>": 3, "<think>": 4}
    assert tokenizer.encode("abba<think><|im_end|>") == [2, 1, 0, 4, 3]
    assert tokenizer.decode([2, 4, 3], skip_special=True) == "ab<think>"
    assert tokenizer.vocab_size == 5


def test_a_tokenizer_json_beside_the_file_is_preferred(tmp_path: Path) -> None:
    path = small().write(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_gguf(path).tokenizer == tmp_path / "tokenizer.json"


def test_a_file_without_tokenizer_is_whole(tmp_path: Path) -> None:
    file = small()
    file.keys = {key: v for key, v in file.keys.items() if not key.startswith("tokenizer.")}
    checkpoint = open_gguf(file.write(tmp_path / "m.gguf"))
    assert checkpoint.tokenizer is None
    assert checkpoint.chat_template is None
    assert checkpoint.generation.eos_token_ids == ()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A file with the released vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    sizes = {"hidden_size": 2, "head_dim": 2, "intermediate_size": 2, "num_hidden_layers": 1}
    config, weights = random_model(tied=True, vocab_size=151936, **sizes)
    write_gguf(path, config, weights, tokenizer=tokenizer_file)
    return path


def test_the_released_tokenizer_is_made_again_setting_by_setting(
    released: Path, tokenizer_file: Path
) -> None:
    text = open_gguf(released).tokenizer
    assert isinstance(text, str)
    found = json.loads(text)
    expected = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    expected["model"]["merges"] = [" ".join(pair) for pair in expected["model"]["merges"]]
    assert found == expected


def test_the_released_vocabulary_gives_the_same_ids(released: Path, tokenizer: Tokenizer) -> None:
    text = open_gguf(released).tokenizer
    assert isinstance(text, str)
    found = Tokenizer(text)
    assert found.added_tokens == tokenizer.added_tokens
    assert (found.size, found.vocab_size) == (tokenizer.size, tokenizer.vocab_size)
    for case in CASES["encode"]:
        assert found.encode(case["text"]) == case["ids"], case["text"]
        assert found.encode(case["text"], plain=True) == tokenizer.encode(case["text"], plain=True)
        for skip in (False, True):
            assert found.decode(case["ids"], skip) == tokenizer.decode(case["ids"], skip)


def test_the_released_vocabulary_is_read_in_no_time(released: Path) -> None:
    content = released.read_bytes()
    start = time.process_time()
    header = read_header(io.BytesIO(content), len(content), "x")
    # Measured: 0.2 s on two shared cores, where the gguf library's reader takes 12 s.
    assert time.process_time() - start < 2
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 151936
    assert len(header.metadata["tokenizer.ggml.merges"]) == 151387


# --- what is refused: the tokenizer ---


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("model", "llama", UnsupportedError, "tokenizer.ggml.model must be 'gpt2', found 'llama'"),
        ("pre", "qwen35", UnsupportedError, "tokenizer.ggml.pre must be 'qwen2', found 'qwen35'"),
        ("pre", None, UnsupportedError, "tokenizer.ggml.pre must be 'qwen2', found None"),
        ("tokens", None, CheckpointError, "tokenizer.ggml.tokens must be an array of strings"),
        (
            "merges",
            3,
            CheckpointError,
            "tokenizer.ggml.merges must be an array of strings, found 3",
        ),
        ("token_type", None, CheckpointError, "token_type must have a number for each of the 6"),
        ("token_type", np.int32([1]), CheckpointError, "6 tokens, found an array of 1"),
        (
            "token_type",
            np.int32([1, 1, 6, 1, 1, 1]),
            UnsupportedError,
            "token_type of token 2 is 6; known are",
        ),
        ("tokens", list("aabbcd"), CheckpointError, "tokens has the same token twice"),
    ],
)
def test_another_tokenizer_is_refused(
    tmp_path: Path, key: str, value: Any, kind: type[CheckpointError], message: str
) -> None:
    file = small()
    file.keys.pop(f"tokenizer.ggml.{key}")
    if value is not None:
        file.keys[f"tokenizer.ggml.{key}"] = value
    assert message in refused(file.write(tmp_path / "m.gguf"), kind)


def test_merges_of_no_tokens_are_refused_by_the_tokenizer() -> None:
    text = read_tokenizer(header_of(small()).metadata | {"tokenizer.ggml.merges": ["x y"]}, "x")
    assert text is not None
    with pytest.raises(CheckpointError, match="this file: not a readable tokenizer"):
        Tokenizer(text, "this file")


# --- what is refused: the model ---


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("block_count", None, CheckpointError, "qwen3.block_count is missing"),
        ("block_count", 0, CheckpointError, "block_count must be a positive integer, found 0"),
        (
            "block_count",
            4_000_000_000,
            CheckpointError,
            "4000000000 layers are announced, but there are only 14",
        ),
        ("block_count", 2, CheckpointError, "do not fit its metadata: missing blk.1.attn_norm"),
        ("embedding_length", 8.0, CheckpointError, "must be a positive integer, found 8.0"),
        ("embedding_length", 16, CheckpointError, "has shape (10, 8), expected (10, 16)"),
        (
            "attention.head_count_kv",
            np.int32([1, 1]),
            CheckpointError,
            "head_count_kv must be a positive integer, found an array of 2",
        ),
        ("attention.head_count", 3, CheckpointError, "shape (8, 8), expected (12, 8)"),
        ("attention.value_length", 8, UnsupportedError, "value_length must be 4, found 8"),
        ("rope.dimension_count", 2, UnsupportedError, "dimension_count must be 4, found 2"),
        ("attention.causal", False, UnsupportedError, "causal must be True, found False"),
        ("vocab_size", 11, UnsupportedError, "vocab_size must be 10, found 11"),
        ("attention.scale", 0.5, UnsupportedError, "qwen3.attention.scale: unknown key (1 such"),
        ("sca\r\x1b[2J", 1, UnsupportedError, r"qwen3.'sca\r\x1b[2J': unknown key"),
        ("attention.layer_norm_rms_epsilon", None, CheckpointError, "rms_epsilon is missing"),
        ("attention.layer_norm_rms_epsilon", 0.0, CheckpointError, "rms_norm_eps must be a pos"),
        ("rope.freq_base", float("nan"), CheckpointError, "freq_base must be a number, found nan"),
        ("rope.freq_base", "1e6", CheckpointError, "freq_base must be a number, found '1e6'"),
        ("rope.scaling.type", "longrope", UnsupportedError, "'none' or 'yarn', found 'longrope'"),
        ("rope.scaling.factor", 4.0, UnsupportedError, "found 'linear' with factor 4"),
        ("rope.scaling.attn_factor", 2.0, UnsupportedError, "computed with YaRN only"),
        ("rope.scaling.yarn_ext_factor", 0.5, UnsupportedError, "ext_factor must be 1, found 0.5"),
        ("rope.scaling.type", "yarn", CheckpointError, "factor must be at least 1, found 0"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, key: str, value: Any, kind: type[CheckpointError], message: str
) -> None:
    file = small()
    file.keys.pop(f"qwen3.{key}", None)
    if value is not None:
        file.keys[f"qwen3.{key}"] = value
    assert message in refused(file.write(tmp_path / "m.gguf"), kind)


@pytest.mark.parametrize("found", ["llama", "qwen2", 3, None, ["qwen3"]])
def test_another_architecture_is_refused_by_name(tmp_path: Path, found: Any) -> None:
    file = small()
    file.keys.pop("general.architecture")
    if found is not None:
        file.keys["general.architecture"] = found
    message = refused(file.write(tmp_path / "m.gguf"), UnsupportedError)
    shown = "an array of 1" if found == ["qwen3"] else repr(found)
    assert f"general.architecture must be qwen3 or qwen3moe, found {shown}" in message


def test_keys_without_effect_are_read_over(tmp_path: Path) -> None:
    file = small()
    file.keys |= {
        "general.file_type": 9999,
        "general.tags": ["a"],
        "quantize.imatrix.file": "x",
        "tokenizer.ggml.anything": Raw(STRING, string("x")),
        "qwen3.rope.scaling.finetuned": False,
        "qwen3.rope.scaling.type": "none",
        "qwen3.rope.dimension_count": 4,
        "qwen3.vocab_size": VOCAB,
    }
    assert open_gguf(file.write(tmp_path / "m.gguf")).config.yarn is None


def test_yarn_is_read(tmp_path: Path) -> None:
    file = small()
    file.keys |= {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
    yarn = open_gguf(file.write(tmp_path / "m.gguf")).config.yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, 64)
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    file.keys |= {
        "qwen3.rope.scaling.original_context_length": 16,
        "qwen3.rope.scaling.attn_factor": 2.0,
        "qwen3.rope.scaling.yarn_attn_factor": 1.5,
        "qwen3.rope.scaling.yarn_beta_fast": 16.0,
        "qwen3.rope.scaling.yarn_beta_slow": 2.0,
    }
    yarn = open_gguf(file.write(tmp_path / "m.gguf")).config.yarn
    assert yarn is not None
    assert (yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (16, 16, 2)
    assert yarn.attention_factor == pytest.approx(3 * (0.1 * np.log(4) + 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_shared_feed_forward_length", 5),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.0),
        ("expert_weights_norm", False),
        ("leading_dense_block_count", 1),
    ],
)
def test_another_mixture_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    file = small(moe=True)
    file.keys[f"qwen3moe.{key}"] = value
    assert f"qwen3moe.{key} must be" in refused(file.write(tmp_path / "m.gguf"), UnsupportedError)


def test_all_weights_that_do_not_fit_are_in_one_error(tmp_path: Path) -> None:
    file = small()
    file.tensors.remove(file.tensor("blk.0.attn_q.weight"))
    file.tensor(GATE).dims = (D, F - 4)
    file.tensors += [Tensor("blk.0.attn_q.bias", (D,)), Tensor("blk.00.attn_q.weight", (D, D))]
    file.place()
    message = refused(file.write(tmp_path / "m.gguf"))
    assert "the weights do not fit its metadata: missing blk.0.attn_q.weight; " in message
    assert f"{GATE} has shape (8, 8), expected (12, 8)" in message
    assert "unexpected blk.0.attn_q.bias; unexpected blk.00.attn_q.weight" in message


def test_norms_are_floats(tmp_path: Path) -> None:
    file = small()
    norm = file.tensor("blk.0.attn_norm.weight")
    norm.dims = (32,)
    file.place()
    norm.kind = Q8_0
    file.keys["qwen3.embedding_length"] = 32
    message = refused(file.write(tmp_path / "m.gguf"))
    assert "attn_norm.weight has type Q8_0, expected F32" in message


def test_a_model_without_embedding_is_refused(tmp_path: Path) -> None:
    file = small()
    file.tensors.pop(0)
    assert "missing token_embd.weight" in refused(file.write(tmp_path / "m.gguf"))


# --- what is refused: the file ---


def change(**values: Any) -> Callable[[File], None]:
    return lambda file: file.__dict__.update(values)


def key(name: str, value: Any) -> Callable[[File], None]:
    return lambda file: file.keys.update({name: value})


def tensor(**values: Any) -> Callable[[File], None]:
    return lambda file: file.tensor(GATE).__dict__.update(values)


def array_of(kind: int, count: int, content: bytes = b"") -> Raw:
    return Raw(ARRAY, struct.pack("<IQ", kind, count) + content)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (change(magic=b"GGML"), CheckpointError, "not a GGUF file, it begins with b'GGML'"),
        (change(magic=b"PK\3\4"), CheckpointError, "not a GGUF file"),
        (change(version=1), UnsupportedError, "GGUF with version 1 is not supported"),
        (change(version=4), UnsupportedError, "GGUF with version 4 is not supported"),
        (change(version=3 << 24), UnsupportedError, "big-endian numbers (version 3)"),
        (change(key_count=2**63), CheckpointError, "keys: 9223372036854775808 announced, but"),
        (change(key_count=25), CheckpointError, "damaged"),
        (change(tensor_count=2**40), CheckpointError, "tensors: 1099511627776 announced, but"),
        (change(more_keys=[("general.name", 1)]), CheckpointError, "general.name is there twice"),
        (
            key("a", Raw(STRING, struct.pack("<Q", 2**50))),
            CheckpointError,
            "a reaches to byte 1125",
        ),
        (key("a", Raw(STRING, string(b"\xff"))), CheckpointError, "a is not UTF-8"),
        (key("a", Raw(77, b"")), CheckpointError, "a has the unknown value type 77"),
        (key("a", array_of(ARRAY, 1)), UnsupportedError, "a is an array of arrays"),
        (key("a", array_of(99, 1)), CheckpointError, "a has the unknown value type 99"),
        (key("a", array_of(STRING, 2**60)), CheckpointError, "a: 1152921504606846976 announced"),
        (key("a", array_of(10, 2**60)), CheckpointError, "a: 1152921504606846976 announced"),
        (key("a" * 10**5, Raw(77, b"")), CheckpointError, "aaa... has the unknown value type"),
        (key("a\nb", Raw(77, b"")), CheckpointError, r"'a\nb' has the unknown value type 77"),
        (key("general.alignment", 0), CheckpointError, "a power of two, found 0"),
        (key("general.alignment", 24), CheckpointError, "a power of two, found 24"),
        (key("general.alignment", 2**31), CheckpointError, "not a multiple of 2147483648"),
        (key("general.alignment", 8.0), CheckpointError, "a power of two, found 8.0"),
        (tensor(name="output.weight"), CheckpointError, "output.weight is there twice"),
        (tensor(dims=()), CheckpointError, "has 0 dimensions, expected 1 to 4"),
        (tensor(dims=(1,) * 5), CheckpointError, "has 5 dimensions, expected 1 to 4"),
        (tensor(dims=(D, 0)), CheckpointError, "has the impossible shape (0, 8)"),
        (tensor(dims=(2**32, 2**32)), CheckpointError, "has the impossible shape"),
        (tensor(dims=(D, 2**40)), CheckpointError, "truncated: expected 3518437"),
        (tensor(kind=99), UnsupportedError, "ffn_gate.weight has type 99, which is not supported"),
        (tensor(kind=39), UnsupportedError, "has type MXFP4, which is not supported; supported"),
        (tensor(kind=Q8_0), CheckpointError, "rows of Q8_0 are whole blocks of 32"),
        (tensor(offset=1), CheckpointError, "begins at byte 1, not a multiple of 32"),
        (tensor(offset=0), CheckpointError, "begins at byte 0 of the data, within "),
        (tensor(offset=2**63), CheckpointError, "truncated: expected 922337203685477"),
        (change(data=bytes(100)), CheckpointError, "download it again"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, damage: Callable[[File], None], kind: type[CheckpointError], message: str
) -> None:
    file = small()
    damage(file)
    found = refused(file.write(tmp_path / "m.gguf"), kind)
    assert message in found
    assert len(found) < 500 + len(str(tmp_path))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = small().to_bytes()
    path = tmp_path / "m.gguf"
    last = len(content) - 32  # padding behind the last tensor may be missing
    for size in [*range(0, last, 37), last]:
        path.write_bytes(content[:size])
        assert str(path) in refused(path)


def test_a_file_that_ends_early_while_it_is_read_is_refused() -> None:
    content = small().to_bytes()
    with pytest.raises(CheckpointError, match=rf"x: expected {len(content)} bytes, but it ends at"):
        read_header(io.BytesIO(content[:300]), len(content), "x")


def test_other_types_of_floats_have_their_own_size(tmp_path: Path) -> None:
    for kind, format in ((F16, "float16"), (BF16, "bfloat16")):
        file = small()
        file.tensor(GATE).kind = kind
        stored = open_gguf(file.write(tmp_path / "m.gguf")).weights
        weight = stored["model.layers.0.mlp.gate_proj.weight"]
        assert (weight.format, weight.nbytes) == (format, D * F * 2)


# --- what is refused: parts ---


def test_missing_parts_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, split(small(), 4))
    paths[1].unlink()
    paths[2].unlink()
    for part in (paths[0], paths[3]):
        message = refused(part)
        assert "2 of 4 parts missing: m-00002-of-00004.gguf, m-00003-of-00004.gguf;" in message


def test_a_part_with_a_name_of_its_own_is_refused(tmp_path: Path) -> None:
    path = write_parts(tmp_path, split(small(), 2))[0].rename(tmp_path / "mine.gguf")
    assert "one of 2 parts (split.count), but its name does not end in" in refused(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.no", np.uint16(0), "split.no must be 1 in this part, found 0"),
        ("split.count", np.uint16(3), "split.count must be 2 in this part, found 3"),
        ("split.no", np.int32([1, 1]), "split.no must be 1 in this part, found an array of 2"),
        ("split.no", "1", "split.no must be 1 in this part, found '1'"),
    ],
)
def test_parts_of_different_models_are_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    files = split(small(), 2)
    files[1].keys[key] = value
    assert message in refused(write_parts(tmp_path, files)[0])


def test_a_strange_number_of_parts_is_refused(tmp_path: Path) -> None:
    file = small()
    for count in (np.int32([1, 1]), "2", True, -1, 2**31):
        file.keys["split.count"] = np.int64(count) if type(count) is int else count
        assert "parts (split.count), but its name" in refused(file.write(tmp_path / "m.gguf"))


def test_parts_with_too_many_tensors_are_refused(tmp_path: Path) -> None:
    files = split(small(), 2)
    files[0].keys["split.tensors.count"] = np.int32(99)
    message = refused(write_parts(tmp_path, files)[0])
    assert "split.tensors.count is 99, but its 2 parts have 14 tensors" in message
    files[1].tensors.append(replace(files[0].tensors[0]))
    assert "token_embd.weight is in m-00001-of-00002.gguf too" in refused(
        write_parts(tmp_path, [file.place() for file in files])[0]
    )


def test_a_folder_in_place_of_a_part_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, split(small(), 2))
    paths[1].unlink()
    paths[1].mkdir()
    assert "1 of 2 parts missing" in refused(paths[0])
