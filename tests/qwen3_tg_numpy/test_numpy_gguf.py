"""The reference's GGUF reader: blocks by hand, files against float checkpoints, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import qwen3_tg_numpy
from format_writers import BLOCK_TYPES, gguf_parts, random_model, write_float, write_gguf
from qwen3_tg_numpy import CheckpointError
from qwen3_tg_numpy.gguf_config import config_json
from qwen3_tg_numpy.gguf_file import read_gguf, weight_of
from qwen3_tg_numpy.quantised import Packed, to_float32

IDS = [3, 141, 59, 26, 53, 58, 97, 93]
TOKENIZER = Path(__file__).parent.parent.parent / "qwen3_tg" / "tiny" / "tokenizer.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
Type = gguf.GGMLQuantizationType

# metadata of a Qwen3-0.6B
METADATA = {
    "general.architecture": "qwen3",
    "qwen3.block_count": 28,
    "qwen3.context_length": 40960,
    "qwen3.embedding_length": 1024,
    "qwen3.feed_forward_length": 3072,
    "qwen3.attention.head_count": 16,
    "qwen3.attention.head_count_kv": 8,
    "qwen3.attention.key_length": 128,
    "qwen3.attention.value_length": 128,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3.rope.freq_base": 1e6,
}
METADATA_MOE = {key.replace("qwen3.", "qwen3moe."): v for key, v in METADATA.items()} | {
    "general.architecture": "qwen3moe",
    "qwen3moe.expert_count": 128,
    "qwen3moe.expert_used_count": 8,
    "qwen3moe.expert_feed_forward_length": 768,
}


def f16(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def block(size: int, **parts: bytes) -> np.ndarray:
    """Zeros, but for bytes at the offsets that the names say: at4=... begins at byte 4."""
    data = bytearray(size)
    for name, value in parts.items():
        start = int(name.removeprefix("at"))
        data[start : start + len(value)] = value
    return np.frombuffer(bytes(data), np.uint8)


# --- blocks by hand


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("Q8_0", block(34, at0=f16(0.5), at2=b"\x03\xfe"), {0: 1.5, 1: -1, 2: 0}),
        ("Q4_0", block(18, at0=f16(0.5), at2=b"\x9a"), {0: 1, 16: 0.5, 1: -4}),
        ("Q5_0", block(22, at0=f16(0.5), at2=b"\x01\x00\x01\x00\x9a"), {0: 5, 16: 4.5}),
        (
            "Q4_K",
            block(144, at0=f16(0.25, 0.5), at4=b"\x0a\x0c\0\0\x05\x06", at16=b"\x73"),
            {0: 5, 32: 18},
        ),
        (
            "Q4_K",
            block(144, at0=f16(0.25, 0.5), at4=b"\x80\0\0\0\x40\0\0\0\x25", at80=b"\x03"),
            {128: 18.75},
        ),
        (
            "Q5_K",
            block(176, at0=f16(0.25, 0.5), at4=b"\x0a\x0c\0\0\x05\x06", at16=b"\x01", at48=b"\x73"),
            {0: 45},
        ),
        (
            "Q6_K",
            block(
                210,
                at0=b"\x5c",
                at128=b"\x02",
                at192=np.array([-20, 0, 0, 0, 7], np.int8).tobytes(),
                at208=f16(0.125),
            ),
            {0: -30, 64: -23.625},
        ),
        (
            "IQ4_XS",
            block(136, at0=f16(0.125), at2=b"\x02\0\x08", at8=b"\xf3"),
            {0: -65, 16: 113},
        ),
        (
            "Q3_K",
            block(110, at0=b"\x01", at32=b"\x02", at96=b"\x03", at104=b"\x02", at108=f16(0.5)),
            {0: 3, 1: -6},
        ),
        ("Q2_K", block(84, at0=b"\x35", at16=b"\x03", at80=f16(0.5, 0.25)), {0: 6.75}),
    ],
)
def test_blocks_by_hand(kind, data, expected):
    size = gguf.GGML_QUANT_SIZES[Type[kind]][0]
    rows = np.stack([np.zeros_like(data), data])
    weight = weight_of(Type[kind], rows)
    assert isinstance(weight, Packed)
    assert weight.shape == (2, size)
    found = weight[1:2]
    assert {i: found[0, i] for i in expected} == expected
    assert np.array_equal(weight[np.array([1])], found)


def test_bfloat16_is_the_upper_half_of_float32():
    weight = weight_of(Type.BF16, np.array([[0x80, 0x3F, 0x20, 0xC0]], np.uint8))
    assert to_float32(weight).tolist() == [[1.0, -2.5]]


@pytest.mark.parametrize("kind", ["I32", "F64"])
def test_types_without_a_decoder_are_known_as_such(kind):
    with pytest.raises(NotImplementedError):
        weight_of(Type[kind], np.zeros((2, 2), np.int32))


# --- files against the float checkpoint of what is in them


def assert_same(path: Path, config: dict, values: dict[str, np.ndarray], folder: Path) -> None:
    """The file has exactly these weights, and the logits of a float checkpoint of them."""
    _, stored, _ = read_gguf(path)
    assert set(stored) == set(values)
    for name, weight in stored.items():
        assert np.array_equal(to_float32(weight), values[name]), name
    write_float(folder, config, values)
    found, expected = qwen3_tg_numpy.load(path), qwen3_tg_numpy.load(folder)
    assert np.array_equal(found.logits(IDS), expected.logits(IDS))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCK_TYPES])
def test_every_type_gives_the_weights_that_were_written(kind, tmp_path):
    moe = len(kind) % 2 == 0
    config, weights = random_model(moe=moe, tied=kind[-1] == "K", num_hidden_layers=1)
    values = write_gguf(tmp_path / "model.gguf", config, weights, type_of=kind)
    assert_same(tmp_path / "model.gguf", config, values, tmp_path / "float")


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "options",
    [
        {"split": 3},
        {"split": 3, "empty_first_part": True, "version": 2},
        {"alignment": 64},
        {"type_of": lambda name: "Q6_K" if "down" in name else "Q4_K"},
    ],
    ids=["split", "empty first part", "alignment", "mixed"],
)
def test_layouts_of_files(moe, options, tmp_path):
    config, weights = random_model(moe=moe)
    values = write_gguf(tmp_path / "model.gguf", config, weights, **options)
    for part in gguf_parts(tmp_path / "model.gguf"):  # any of them will do
        assert_same(part, config, values, tmp_path / "float")


def test_no_output_means_tied_and_an_output_counts(tmp_path):
    config, weights = random_model(tied=True)
    values = write_gguf(tmp_path / "tied.gguf", config, weights, type_of="Q4_K")
    assert "lm_head.weight" not in values
    assert qwen3_tg_numpy.load(tmp_path / "tied.gguf").config.tie_word_embeddings
    assert_same(tmp_path / "tied.gguf", config, values, tmp_path / "a")

    def kind(name: str) -> str:
        return "Q8_0" if name == "output.weight" else "Q4_K"

    values = write_gguf(tmp_path / "own.gguf", config, weights, type_of=kind, tied_output=True)
    assert not qwen3_tg_numpy.load(tmp_path / "own.gguf").config.tie_word_embeddings
    untied = config | {"tie_word_embeddings": False}
    assert_same(tmp_path / "own.gguf", untied, values, tmp_path / "b")


def test_yarn_in_a_file_is_yarn_in_config_json(tmp_path):
    config, weights = random_model(rope_scaling=YARN, rms_norm_eps=2.0**-20)  # a float32
    values = write_gguf(tmp_path / "model.gguf", config, weights)
    assert_same(tmp_path / "model.gguf", config, values, tmp_path / "float")
    reference = qwen3_tg_numpy.load(tmp_path / "model.gguf")
    assert reference.config == qwen3_tg_numpy.load(tmp_path / "float").config
    assert reference.config.max_positions == 128


def test_the_end_token_is_that_of_the_tokenizer(tmp_path):
    config, weights = random_model(vocab_size=2048)
    write_gguf(tmp_path / "with.gguf", config, weights, tokenizer=TOKENIZER)
    write_gguf(tmp_path / "without.gguf", config, weights)
    field = gguf.GGUFReader(tmp_path / "with.gguf").fields["tokenizer.ggml.eos_token_id"]
    assert qwen3_tg_numpy.load(tmp_path / "with.gguf").eos_token_ids == (field.contents(),)
    assert qwen3_tg_numpy.load(tmp_path / "without.gguf").eos_token_ids == ()


# --- metadata


def test_the_metadata_reads_as_config_json():
    assert config_json(METADATA, "here") == {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
    }
    moe = config_json(METADATA_MOE | {"qwen3moe.expert_shared_feed_forward_length": 0}, "here")
    assert (moe["model_type"], moe["norm_topk_prob"]) == ("qwen3_moe", True)
    assert (moe["num_experts"], moe["num_experts_per_tok"]) == (128, 8)
    assert (moe["moe_intermediate_size"], moe["intermediate_size"]) == (768, 3072)


def test_the_metadata_of_yarn():
    keys: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_context_length": 32768}
    rare = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_attn_factor": 0.5}
    rare |= {"attn_factor": 3.0, "yarn_ext_factor": 1.0}

    def read(keys: dict[str, Any]) -> dict[str, Any]:
        scaling = {f"qwen3.rope.scaling.{key}": value for key, value in keys.items()}
        return config_json(METADATA | scaling, "here")["rope_scaling"]

    paper = 0.1 * np.log(4) + 1
    assert read(keys)["attention_factor"] == pytest.approx(paper)
    found = read(keys | rare)
    assert found["attention_factor"] == pytest.approx(1.5 * paper)
    assert (found["beta_fast"], found["beta_slow"]) == (16, 2)
    assert found["original_max_position_embeddings"] == 32768
    assert read({"type": "none"}) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture .*'qwen2'"),
        ({"general.architecture": "qwen3moe"}, "missing qwen3moe.block_count"),
        ({"qwen3.rope.scaling.type": "linear"}, "qwen3.rope.scaling.type .*'linear'"),
        ({"qwen3.rope.scaling.type": "yarn"}, "qwen3.rope.scaling.factor .*None"),
        ({"qwen3.attention.value_length": 64}, "value_length must be 128, found 64"),
        ({"qwen3.rope.dimension_count": 64}, "dimension_count must be 128, found 64"),
        ({"qwen3.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor must be 1, found 0.5"),
        ({"qwen3.attention.sliding_window": 4096}, "unknown qwen3.attention.sliding_window"),
        ({"qwen3.pooling_type": 3}, "unknown qwen3.pooling_type"),
    ],
)
def test_metadata_that_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=f"^here: .*{named}"):
        config_json(METADATA | changes, "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_shared_feed_forward_length": 512},
        {"expert_gating_func": 2},
        {"expert_weights_norm": False},
        {"leading_dense_block_count": 1},
    ],
)
def test_a_mixture_that_llama_cpp_does_not_compute_for_qwen3_is_refused(changes):
    changes = {f"qwen3moe.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        config_json(METADATA_MOE | changes, "here")


# --- files that do not fit


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    config, weights = random_model(num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", config, weights, type_of="Q8_0", split=3)
    return gguf_parts(tmp_path / "model.gguf")


def test_lost_and_wrong_parts_are_named(split):
    second = split[1].read_bytes()
    split[1].unlink()
    with pytest.raises(CheckpointError, match=r"parts not there: model-00002-of-00003\.gguf"):
        qwen3_tg_numpy.load(split[0])
    shutil.copy(split[2], split[1])
    with pytest.raises(
        CheckpointError, match=r"00002-of-00003\.gguf: split\.no must be 1, found 2"
    ):
        qwen3_tg_numpy.load(split[0])
    split[1].write_bytes(second)
    renamed = split[0].rename(split[0].with_name("first.gguf"))
    with pytest.raises(CheckpointError, match=r"one of 3 parts: expected a name like"):
        qwen3_tg_numpy.load(renamed)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_noticed(share, split):
    data = split[0].read_bytes()
    split[0].write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"00001-of-00003\.gguf: "):
        qwen3_tg_numpy.load(split[0])


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.gguf: expected a GGUF file"):
        qwen3_tg_numpy.load(tmp_path / "none.gguf")
    (tmp_path / "model.gguf").write_bytes(b"PK" * 100)
    with pytest.raises(CheckpointError, match=r"model\.gguf: not a whole GGUF file"):
        qwen3_tg_numpy.load(tmp_path / "model.gguf")
    config, weights = random_model(num_hidden_layers=1)
    write_gguf(tmp_path / "four.gguf", config, weights, version=4)
    with pytest.raises(CheckpointError, match=r"four\.gguf: .*version 4"):
        qwen3_tg_numpy.load(tmp_path / "four.gguf")


def write_raw(path: Path, arch: str, tensors: dict[str, np.ndarray]) -> None:
    """A file with the sizes of random_model(num_hidden_layers=1) and these tensors."""
    writer = gguf.GGUFWriter(path, arch)
    integers = {"block_count": 1, "context_length": 128, "embedding_length": 256}
    integers |= {"feed_forward_length": 512, "attention.head_count": 4}
    integers |= {"attention.head_count_kv": 2, "attention.key_length": 128}
    for key, value in integers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_embedding_without_axes_and_a_list_of_part_counts_are_refused(tmp_path):
    write_raw(tmp_path / "flat.gguf", "qwen3", {"token_embd.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"missing token_embd\.weight, a matrix"):
        qwen3_tg_numpy.load(tmp_path / "flat.gguf")
    writer = gguf.GGUFWriter(tmp_path / "list.gguf", "qwen3")
    writer.add_array("split.count", [1, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"list\.gguf: split\.count must be a number"):
        qwen3_tg_numpy.load(tmp_path / "list.gguf")


def test_all_tensors_that_do_not_fit_come_in_one_error(tmp_path):
    tensors = {
        "token_embd.weight": np.zeros((192, 256), np.float32),
        "blk.0.attn_q.weight": np.zeros((256, 512), np.float32),
        "blk.0.attn_q.bias": np.zeros(512, np.float32),
        "blk.0.attn_k.weight": np.zeros((256, 256), np.int32),
        "blk.0.ffn_up_exps.weight": np.zeros((4, 256), np.float32),
    }
    write_raw(tmp_path / "model.gguf", "qwen3", tensors)
    with pytest.raises(CheckpointError) as caught:
        qwen3_tg_numpy.load(tmp_path / "model.gguf")
    message = str(caught.value)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert f"{name}: expected shape (512, 256), found (256, 512)" in message
    assert "unexpected blk.0.attn_q.bias" in message
    assert "blk.0.attn_k.weight: type I32 is not decoded here" in message
    assert "unexpected blk.0.ffn_up_exps.weight" in message
    assert "missing model.norm.weight" in message
    del tensors["token_embd.weight"]
    write_raw(tmp_path / "model.gguf", "qwen3", tensors)
    with pytest.raises(CheckpointError, match=r"missing token_embd\.weight"):
        qwen3_tg_numpy.load(tmp_path / "model.gguf")
