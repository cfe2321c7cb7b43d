"""The reader of Hugging Face directories: exact values, and one clear error for each damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from text_data import DATA

from qwen3_tg.checkpoint import Checkpoint, locate, open_checkpoint
from qwen3_tg.checkpoint.locate import TINY
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError, UnsupportedError
from qwen3_tg.linear import to_device

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 24,
    "hidden_size": 10,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"


def make_weights(dtype: Any = np.float32, **changes: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = ModelConfig.from_dict(CONFIG | changes).weight_shapes()
    return {name: random.normal(0, 1, shape).astype(dtype) for name, shape in shapes.items()}


def make_folder(
    path: Path, weights: dict[str, np.ndarray] | None = None, shards: int = 0, **changes: Any
) -> Path:
    """A model directory: one file, or `shards` files with their index."""
    weights = make_weights(**changes) if weights is None else weights
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    if not shards:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[n::shards])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(path, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return path


def write_index(path: Path, index: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def refused(path: Path | str, kind: type[CheckpointError] = CheckpointError) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_holds(checkpoint: Checkpoint, weights: dict[str, np.ndarray], format: str) -> None:
    assert list(checkpoint.weights) == list(checkpoint.config.weight_shapes())
    for name, stored in checkpoint.weights.items():
        assert (stored.format, stored.shape) == (format, weights[name].shape)
        assert stored.arrays["data"].tobytes() == weights[name].tobytes(), name
        found = to_device(stored, "CPU", frozenset({"float16"})).values().float().numpy()
        assert np.array_equal(found, weights[name].astype(np.float32)), name


# --- what is read ---


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_every_weight_is_read_bit_for_bit(tmp_path, format, shards):
    weights = make_weights(DTYPES[format])
    checkpoint = open_checkpoint(str(make_folder(tmp_path, weights, shards)))
    assert checkpoint.path == tmp_path
    assert checkpoint.config == ModelConfig.from_dict(CONFIG)
    assert_holds(checkpoint, weights, format)


def test_one_checkpoint_may_hold_several_dtypes(tmp_path):
    weights = make_weights(np.float16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    weights[K_PROJ] = weights[K_PROJ].astype(ml_dtypes.bfloat16)
    checkpoint = open_checkpoint(str(make_folder(tmp_path, weights)))
    formats = {name: stored.format for name, stored in checkpoint.weights.items()}
    assert formats.pop("model.norm.weight") == "float32"
    assert formats.pop(K_PROJ) == "bfloat16"
    assert set(formats.values()) == {"float16"}
    for name, stored in checkpoint.weights.items():
        assert stored.arrays["data"].tobytes() == weights[name].tobytes()


def test_every_bfloat16_becomes_the_float32_it_stands_for(tmp_path):
    weights = make_weights(ml_dtypes.bfloat16, vocab_size=65536, hidden_size=1)
    everything = np.arange(65536, dtype=np.uint16)
    weights["lm_head.weight"] = everything.view(ml_dtypes.bfloat16).reshape(65536, 1)
    path = make_folder(tmp_path, weights, vocab_size=65536, hidden_size=1)
    stored = open_checkpoint(str(path)).weights["lm_head.weight"]
    found = to_device(stored, "CPU", frozenset()).values().numpy()
    assert np.array_equal(found.view(np.uint32)[:, 0], everything.astype(np.uint32) << 16)


def test_the_data_cannot_be_written_to(folder):
    stored = open_checkpoint(str(folder)).weights["model.norm.weight"]
    with pytest.raises(ValueError, match="read-only"):
        stored.arrays["data"][0] = 1


def test_a_header_of_any_length_leaves_the_values_in_place(tmp_path):
    weights = make_weights()
    path = make_folder(tmp_path, weights)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for more in range(1, 4):  # so that no value lies on a boundary of four bytes
        header = whole[8 : 8 + length] + b" " * more
        file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
        assert_holds(open_checkpoint(str(path)), weights, "float32")


@pytest.mark.parametrize("shards", [0, 2])
def test_a_tied_model_may_store_its_lm_head_which_is_left_out(tmp_path, shards):
    weights = make_weights(tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    path = make_folder(tmp_path, weights, shards, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(path))
    assert "lm_head.weight" not in checkpoint.weights
    del weights["lm_head.weight"]
    assert_holds(checkpoint, weights, "float32")


def test_one_whole_file_wins_over_an_index(folder):
    write_index(folder, {"weight_map": {"x": "nowhere.safetensors"}})
    assert_holds(open_checkpoint(str(folder)), make_weights(), "float32")


def test_the_text_side_and_the_end_tokens_are_optional(folder):
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tokenizer is None
    assert checkpoint.chat_template is None
    assert checkpoint.generation.eos_token_ids == (3,)  # of config.json
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_k": 7}')
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tokenizer == folder / "tokenizer.json"
    assert checkpoint.generation.eos_token_ids == (5, 6)
    assert checkpoint.generation.top_k == 7


TEMPLATE = (DATA / "chat_template.jinja").read_bytes().decode()


@pytest.mark.parametrize(
    "stored",
    [
        TEMPLATE,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
    ],
    ids=["a string", "named"],
)
def test_the_chat_template_comes_from_tokenizer_config_where_it_has_no_file(folder, stored):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    assert open_checkpoint(str(folder)).chat_template == TEMPLATE


def test_a_chat_template_in_a_file_of_its_own_wins(folder):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    assert open_checkpoint(str(folder)).chat_template == TEMPLATE


@pytest.mark.parametrize("content", ["{}", '{"chat_template": null}', '{"chat_template": []}'])
def test_a_base_model_has_no_chat_template(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    assert open_checkpoint(str(folder)).chat_template is None


def test_the_embedded_model_opens_by_its_name():
    checkpoint = open_checkpoint("tiny")
    assert checkpoint.path == TINY
    assert checkpoint.tokenizer == TINY / "tokenizer.json"
    assert checkpoint.chat_template


# --- what is refused: the directory ---


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/no-such-model", ""])
def test_a_directory_that_is_not_there_is_refused(model):
    message = refused(model)
    assert message == f"{model!r}: no such directory; give a folder that has config.json"


def test_an_empty_directory_is_refused(tmp_path):
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}: no config.json in it; expected a Hugging Face model")


def test_a_directory_with_only_a_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: no weights: neither model.safetensors nor model.safet")
    assert message.endswith("is the download complete?")


def test_a_single_safetensors_file_is_refused_with_what_is_expected(folder):
    message = refused(folder / "model.safetensors")
    assert message.startswith(f"{folder / 'model.safetensors'}: not a GGUF file")
    assert message.endswith("give a GGUF file, or the folder of a Hugging Face checkpoint")


# --- what is refused: JSON files ---


@pytest.mark.parametrize("content", [b"", b'{"model_type": "qw', b"\xff\xfe\x00", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_broken_json_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert message.startswith(f"{folder / name}: ")
    assert "JSON" in message


def test_a_broken_index_is_named(tmp_path):
    path = make_folder(tmp_path, shards=2)
    file = path / "model.safetensors.index.json"
    file.write_text('{"weight_map": {"a"')
    assert refused(path).startswith(f"{file}: not readable as JSON")
    for index in ({}, {"weight_map": None}, {"weight_map": []}):
        write_index(path, index)
        assert refused(path) == f"{file}: no weight_map in it"


def test_a_config_of_another_model_is_named(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    message = refused(folder, UnsupportedError)
    assert (
        message
        == f"{folder / 'config.json'}: model_type must be 'qwen3' or 'qwen3_moe', found 'llama'"
    )


def test_a_chat_template_that_is_no_text_is_named(folder):
    (folder / "tokenizer_config.json").write_text('{"chat_template": 5}')
    message = refused(folder)
    assert message.startswith(f"{folder / 'tokenizer_config.json'}: chat_template must be a string")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert refused(folder).startswith(f"{folder / 'chat_template.jinja'}: not readable: ")


# --- what is refused: weights ---


def test_missing_shards_are_counted_and_named(tmp_path):
    path = make_folder(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    assert refused(path) == (
        f"{path}: 1 of 3 shards missing: model-00002-of-00003.safetensors; "
        "is the download complete?"
    )
    (path / "model-00001-of-00003.safetensors").unlink()
    assert "2 of 3 shards missing: model-00001-of-00003.safetensors, model-00002" in refused(path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    path = make_folder(tmp_path, shards=2)
    weights = make_weights()
    names = list(weights)
    second = path / "model-00002-of-00002.safetensors"
    save_file({name: weights[name] for name in [*names[1::2], names[0]]}, second)
    assert refused(path) == f"{second}: {names[0]} is in another shard too"


def test_a_tensor_of_the_index_that_is_in_no_shard_is_named(tmp_path):
    path = make_folder(tmp_path, shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.more"] = "model-00001-of-00002.safetensors"
    write_index(path, index)
    assert refused(path) == f"{file}: model.more is in no shard (1 such tensors)"


def whole_file() -> bytes:
    from safetensors.numpy import save

    return save(make_weights())


WHOLE = whole_file()
HEADER_BYTES = struct.unpack("<Q", WHOLE[:8])[0]
LENGTHS = {
    "nothing": 0,
    "half the length": 4,
    "only the length": 8,
    "half the header": 8 + HEADER_BYTES // 2,
    "only the header": 8 + HEADER_BYTES,
    "half the data": (8 + HEADER_BYTES + len(WHOLE)) // 2,
    "all but one byte": len(WHOLE) - 1,
}


@pytest.mark.parametrize("length", [pytest.param(v, id=k) for k, v in LENGTHS.items()])
@pytest.mark.parametrize("shards", [0, 2])
def test_a_file_that_is_cut_off_is_named(tmp_path, length, shards):
    path = make_folder(tmp_path, shards=shards)
    file = path / ("model-00001-of-00002.safetensors" if shards else "model.safetensors")
    file.write_bytes(WHOLE[:length])
    message = refused(path)
    assert message.startswith(f"{file}: not a whole safetensors file (")
    assert message.endswith("; download it again")


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(**changes: Any) -> bytes:
    info = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return with_header(json.dumps({"model.norm.weight": info}).encode(), bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"<!DOCTYPE html><html>not found</html>", id="a web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", id="a Git LFS pointer"),
        pytest.param(bytes(64), id="zeros"),
        pytest.param(b"\xff" * 64, id="a length beyond everything"),
        pytest.param(with_header(b"not JSON at all!"), id="no JSON"),
        pytest.param(with_header(b"\xff\xfe\xfd"), id="not UTF-8"),
        pytest.param(with_header(b"[1, 2]"), id="no object"),
        pytest.param(with_header(b'{"a": {"dtype": "F32"}}'), id="no offsets"),
        pytest.param(one_tensor(data_offsets=[0, 9]), id="offsets beyond the end"),
        pytest.param(one_tensor(data_offsets=[0, 4]), id="offsets too near"),
        pytest.param(one_tensor(data_offsets=[8, 0]), id="offsets backwards"),
        pytest.param(one_tensor(data_offsets=[-8, 0]), id="negative offsets"),
        pytest.param(one_tensor(shape=[3]), id="shape and offsets differ"),
        pytest.param(one_tensor(shape=[-2]), id="negative shape"),
        pytest.param(one_tensor(shape=[2**62, 2**62]), id="a shape beyond everything"),
        pytest.param(one_tensor(dtype="F12"), id="no dtype"),
        pytest.param(one_tensor() + bytes(8), id="more data than tensors"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(content)
    message = refused(folder)
    assert message.startswith(f"{file}: not a whole safetensors file (")


def test_a_file_without_tensors_is_refused_as_all_are_missing(folder):
    (folder / "model.safetensors").write_bytes(with_header(b"{}"))
    assert "missing model.embed_tokens.weight" in refused(folder)


def test_a_dtype_that_is_not_computed_is_named(tmp_path):
    weights = make_weights() | {K_PROJ: np.ones((12, 10), np.int32)}
    path = make_folder(tmp_path, weights)
    assert refused(path) == (
        f"{path}: the weights do not fit config.json: model.safetensors: {K_PROJ} has dtype I32, "
        "expected F32 or F16 or BF16"
    )


def test_a_wrong_shape_is_named_with_the_right_one(tmp_path):
    weights = make_weights()
    weights[K_PROJ] = weights[K_PROJ].T.copy()
    path = make_folder(tmp_path, weights)
    assert refused(path) == (
        f"{path}: the weights do not fit config.json: {K_PROJ} has shape (10, 12), "
        "expected (12, 10)"
    )


@pytest.mark.parametrize("shards", [0, 2])
def test_missing_unexpected_and_misshapen_tensors_come_in_one_error(tmp_path, shards):
    weights = make_weights()
    del weights["model.norm.weight"]
    del weights[K_PROJ]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(24, np.float32)
    weights[Q_NORM] = np.ones(7, np.float32)
    message = refused(make_folder(tmp_path, weights, shards))
    start = f"{tmp_path}: the weights do not fit config.json: "
    assert message.startswith(start)
    assert set(message.removeprefix(start).split("; ")) == {
        "missing model.norm.weight",
        f"missing {K_PROJ}",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        f"{Q_NORM} has shape (7,), expected (6,)",
    }


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path):
    weights = make_weights()
    path = make_folder(tmp_path, {"model.norm.weight": weights["model.norm.weight"]})
    message = refused(path)
    assert message.count("missing") == 8
    assert message.endswith(f"; and {len(weights) - 1 - 8} more")


def test_an_untied_model_needs_its_lm_head(tmp_path):
    weights = make_weights()
    del weights["lm_head.weight"]
    assert refused(make_folder(tmp_path, weights)).endswith(": missing lm_head.weight")


def test_a_layer_too_many_is_refused(tmp_path):
    path = make_folder(tmp_path, make_weights(), num_hidden_layers=1)
    assert "unexpected model.layers.1." in refused(path)


# --- the hub's cache ---

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, made the one that is looked up, with the network forbidden."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    return path


def make_cached(cache: Path, name: str) -> Path:
    """A model as `hf download` leaves it; returns its directory."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    return make_folder(repo / "snapshots" / REVISION)


@pytest.mark.parametrize("typed", ["Qwen/Qwen3-0.6B", "Qwen3-0.6B"])
def test_a_name_in_the_hubs_cache_is_found_with_and_without_its_owner(cache, typed):
    path = make_cached(cache, "Qwen/Qwen3-0.6B")
    assert locate(typed) == path
    assert_holds(open_checkpoint(typed), make_weights(), "float32")


@pytest.mark.parametrize("typed", ["qwen3-0.6b", "qwen/QWEN3-0.6B", "qwen3:0.6b", "Qwen3:0.6B"])
def test_other_capitals_and_ollamas_names_are_understood(cache, typed):
    path = make_cached(cache, "Qwen/Qwen3-0.6B")
    assert locate(typed) == path
    assert "qwen3 pull Qwen/Qwen3-8B-GGUF --type q4_k_m" in refused("qwen3-8b-gguf:q4_k_m")
    assert refused("qwen3:8b").endswith("get it with: qwen3 pull Qwen/Qwen3-8B")
    assert "neither a directory nor a model name" in refused("qwen3:7b")


def test_a_model_of_another_owner_is_found_by_its_whole_name_only(cache):
    path = make_cached(cache, "someone/Qwen3-tuned")
    assert locate("someone/Qwen3-tuned") == path
    assert "Qwen/Qwen3-tuned is not in the local cache" in refused("Qwen3-tuned")


@pytest.mark.parametrize("typed", ["Qwen/Qwen3-0.6B", "Qwen3-0.6B"])
def test_a_name_that_is_not_in_the_cache_says_how_to_get_it(cache, typed):
    assert refused(typed) == (
        f"{typed!r} is no directory here, and Qwen/Qwen3-0.6B is not in the local cache "
        f"({cache}); get it with: qwen3 pull Qwen/Qwen3-0.6B"
    )


def test_a_download_that_broke_off_says_what_is_missing(cache):
    path = make_cached(cache, "Qwen/Qwen3-0.6B")
    (path / "model.safetensors").unlink()
    assert refused("Qwen3-0.6B").startswith(f"{path}: no weights: ")


@pytest.mark.parametrize("typed", ["what is this?", "Qwen/a b", "-x", "a--b", "x.git"])
def test_what_can_be_no_name_is_refused(cache, typed):
    assert refused(typed) == (
        f"{typed!r} is neither a directory nor a model name such as Qwen/Qwen3-0.6B"
    )


def test_a_directory_wins_over_the_name(cache, tmp_path, monkeypatch):
    make_cached(cache, "Qwen/model")
    make_folder(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("model") == Path("model")


@pytest.mark.parametrize("name", ["../other.safetensors", "", 5, "a/b.safetensors"])
def test_a_shard_index_names_files_beside_it_and_nothing_else(tmp_path, name):
    (tmp_path / "config.json").write_text(
        (Path(__file__).parent.parent / "golden/tied_float32/config.json").read_text()
    )
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map must name files beside it"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["~nobody-of-this-name/x", "x" * 300, "x" * 5000])
def test_a_name_that_no_system_takes_is_one_clear_error(model):
    with pytest.raises(CheckpointError):
        open_checkpoint(model)


def test_special_tokens_come_from_the_tokenizer_configuration():
    assert open_checkpoint("tiny").special_tokens == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
