"""What the reference reads and what it refuses: config.json, safetensors, shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import qwen3_tg_numpy
from qwen3_tg_numpy.config import CheckpointError, ModelConfig, Yarn
from qwen3_tg_numpy.quantised import to_float32
from qwen3_tg_numpy.safetensors_file import read_safetensors
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden"

# config.json of Qwen3-0.6B, as released
RELEASED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# config.json of Qwen3-30B-A3B, as released
RELEASED_MOE = RELEASED | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
# what Qwen's model cards say to add for long texts
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a golden model that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "tied_float32", tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_safetensors(file: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- config.json


def test_the_released_config_reads_as_it_says():
    config = ModelConfig.from_dict(RELEASED)
    assert config == ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    parameters = sum(np.prod(shape) for shape in config.weight_shapes().values())
    assert parameters == 596_049_920


def test_transformers_5_keys_mean_the_same_as_transformers_4_keys():
    new = {k: v for k, v in RELEASED.items() if k not in ("rope_theta", "torch_dtype")}
    del new["rope_scaling"]
    new |= {
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    }
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(RELEASED)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "model_type.*qwen2"),
        ({"model_type": "qwen3_moe"}, "architectures.*Qwen3MoeForCausalLM.*found.*Qwen3For"),
        ({"model_type": None}, "model_type.*None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures.*Sequence"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"use_sliding_window": True}, "use_sliding_window.*True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor .*none"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling: factor .*0.5"),
        ({"rope_scaling": YARN | {"beta_fast": "32"}}, "rope_scaling: beta_fast .*'32'"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling: truncate .*1"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor .*-1.0"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "rope_scaling: unknown finetuned"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1.5}}, "original_max.*1.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.*llama3"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.*factor"),
        ({"rope_parameters": 5}, "rope_parameters.*5"),
        ({"rope_theta": 0}, "rope_theta.*0"),
        ({"rope_theta": "1e6"}, "rope_theta.*1e6"),
        ({"num_experts": 8}, "num_experts"),
        ({"partial_rotary_factor": 0.5, "logit_scale": 2.0}, "logit_scale, partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads 16.*num_key_value_heads 3"),
        ({"head_dim": 127}, "head_dim.*127"),
        ({"hidden_size": 0}, "hidden_size.*0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers.*2.0"),
        ({"vocab_size": None}, "vocab_size.*None"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps.*-1e-06"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings.*1"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=f"^here: .*{named}"):
        ModelConfig.from_dict(RELEASED | changes, where="here")


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "num_hidden_layers"])
def test_a_size_that_is_not_there_is_missed_by_name(key):
    with pytest.raises(CheckpointError, match=key):
        ModelConfig.from_dict({k: v for k, v in RELEASED.items() if k != key})


def test_a_rope_theta_beside_the_type_wins_as_in_transformers():
    rope = {"rope_type": "default", "rope_theta": 5e6}
    assert ModelConfig.from_dict(RELEASED | {"rope_parameters": rope}).rope_theta == 5e6


def test_the_released_mixture_reads_as_it_says():
    config = ModelConfig.from_dict(RELEASED_MOE)
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (768, True)
    assert all(config.is_mixture(layer) for layer in range(48))
    parameters = sum(np.prod(shape) for shape in config.weight_shapes().values())
    assert parameters == 30_532_122_624


def test_transformers_5_calls_the_experts_local():
    new = {k: v for k, v in RELEASED_MOE.items() if k != "num_experts"}
    config = ModelConfig.from_dict(new | {"num_local_experts": 128})
    assert config == ModelConfig.from_dict(RELEASED_MOE)
    with pytest.raises(CheckpointError, match=r"num_experts must be num_local_experts 64.*128"):
        ModelConfig.from_dict(RELEASED_MOE | {"num_local_experts": 64})


def test_what_a_mixture_does_not_say_is_as_in_transformers():
    optional = "head_dim num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    optional += "decoder_sparse_step mlp_only_layers router_aux_loss_coef output_router_logits"
    config = ModelConfig.from_dict(
        {k: v for k, v in RELEASED_MOE.items() if k not in optional.split()}
    )
    assert config.head_dim == 2048 // 32  # but 128 in a dense model
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (768, False)
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, ())


@pytest.mark.parametrize(
    ("changes", "mixtures"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 3}, [2]),
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4]),
        ({"mlp_only_layers": None}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [3]),
        ({"num_experts": 0}, []),
    ],
)
def test_a_layer_is_a_mixture_when_its_number_says_so(changes, mixtures):
    config = ModelConfig.from_dict(RELEASED_MOE | {"num_hidden_layers": 5} | changes)
    assert [layer for layer in range(5) if config.is_mixture(layer)] == mixtures
    shapes = config.weight_shapes()
    for layer in range(5):
        name = f"model.layers.{layer}.mlp"
        assert (f"{name}.gate.weight" in shapes) == (layer in mixtures)
        assert shapes.get(f"{name}.up_proj.weight") == (None if layer in mixtures else (6144, 2048))
        expert = shapes.get(f"{name}.experts.127.down_proj.weight")
        assert expert == ((2048, 768) if layer in mixtures else None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": -1}, "num_experts.*-1"),
        ({"num_experts": 4}, "num_experts_per_tok must be at most num_experts 4, found 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok.*0"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size.*None"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob.*yes"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step.*0"),
        ({"mlp_only_layers": 3}, "mlp_only_layers.*3"),
        ({"shared_expert_intermediate_size": 768}, "unknown shared_expert_intermediate_size"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
        ({"model_type": ["qwen3"]}, "model_type must be"),
    ],
)
def test_a_mixture_that_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=f"^here: .*{named}"):
        ModelConfig.from_dict(RELEASED_MOE | changes, where="here")


def test_yarn_takes_what_is_not_said_from_the_paper():
    config = ModelConfig.from_dict(RELEASED | {"rope_scaling": YARN})
    assert config.yarn == Yarn(
        factor=4.0,
        original_max_position_embeddings=32768,
        attention_factor=0.1 * np.log(4) + 1,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
    )
    assert config.rope_theta == 1e6
    older = {"type" if k == "rope_type" else k: v for k, v in YARN.items()}
    assert ModelConfig.from_dict(RELEASED | {"rope_scaling": older}) == config
    newer = {k: v for k, v in RELEASED.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = YARN | {"rope_theta": 1000000, "beta_fast": None}
    assert ModelConfig.from_dict(newer) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.5, "mscale_all_dim": 2.0}, (1 + 0.05 * np.log(4)) / (1 + 0.2 * np.log(4))),
        ({"mscale": 0.5}, 1 + 0.1 * np.log(4)),
        ({"factor": 1.0}, 1.0),
        ({"factor": None}, 1 + 0.1 * np.log(40960 / 32768)),
        ({"factor": None, "original_max_position_embeddings": None}, 1.0),
    ],
)
def test_the_attention_factor_of_yarn_by_hand(changes, expected):
    yarn = ModelConfig.from_dict(RELEASED | {"rope_scaling": YARN | changes}).yarn
    assert yarn.attention_factor == pytest.approx(expected, rel=1e-12)


def test_yarn_makes_room_for_the_stretched_length_and_for_no_less_than_before():
    def limit(**changes: object) -> int:
        return ModelConfig.from_dict(RELEASED | {"rope_scaling": YARN | changes}).max_positions

    assert ModelConfig.from_dict(RELEASED).max_positions == 40960
    assert limit() == 131072
    assert limit(factor=1.0) == 40960
    assert limit(factor=2.5, original_max_position_embeddings=32767) == 81917


def test_config_json_that_is_no_object_is_named(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object, found list"):
        qwen3_tg_numpy.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON file"):
        qwen3_tg_numpy.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        qwen3_tg_numpy.load(folder)


def test_end_tokens_come_from_generation_config_and_else_from_config(folder):
    assert qwen3_tg_numpy.load(folder).eos_token_ids == (210, 209)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    assert qwen3_tg_numpy.load(folder).eos_token_ids == (210,)
    (folder / "generation_config.json").unlink()
    assert qwen3_tg_numpy.load(folder).eos_token_ids == (210,)
    change_config(folder, eos_token_id=None)
    assert qwen3_tg_numpy.load(folder).eos_token_ids == ()
    change_config(folder, eos_token_id="end")
    with pytest.raises(CheckpointError, match=r"eos_token_id.*end"):
        qwen3_tg_numpy.load(folder)


# --- stored numbers


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # signalling NaNs
def test_every_bfloat16_and_float16_decodes_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    for found, expected in (
        (to_float32(bits), bits.view(ml_dtypes.bfloat16).astype(np.float32)),
        (to_float32(bits.view(np.float16)), bits.view(np.float16).astype(np.float64)),
    ):
        assert found.dtype == np.float32
        assert np.array_equal(found, expected, equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_bfloat16_values_by_hand():
    bits = np.array([0x3F80, 0xC020, 0x0000, 0x7F80, 0x3EAB, 0x0001], np.uint16)
    assert to_float32(bits).tolist() == [1.0, -2.5, 0.0, np.inf, 0.333984375, 2.0**-133]


def test_float32_is_not_copied():
    stored = np.arange(4, dtype=np.float32)
    assert to_float32(stored) is stored


def test_tensors_stay_mapped_and_read_only():
    for array in read_safetensors(GOLDEN / "tied_float32" / "model.safetensors").values():
        base = array
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert not array.flags.writeable


def test_our_reader_agrees_with_the_safetensors_library():
    file = GOLDEN / "multi_head_float16" / "model.safetensors"
    expected = load_file(file)
    found = read_safetensors(file)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_data_at_an_odd_byte_reads_the_same(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    for spaces in range(4):  # writers pad the header, but need not
        header = {"__metadata__": {"pad": " " * spaces}, "x": entry}
        write_safetensors(tmp_path / "x.safetensors", header, values.tobytes())
        found = read_safetensors(tmp_path / "x.safetensors")
        assert list(found) == ["x"]
        assert to_float32(found["x"]).tolist() == values.tolist()


# --- files that are damaged


def test_a_file_cut_short_is_noticed_wherever_it_is_cut(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*fully downloaded"):
            qwen3_tg_numpy.load(folder)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"expected .* bytes, found"):
        qwen3_tg_numpy.load(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "header must be an object, found list"),
        ({"x": 3}, "x: not a header entry: 3"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "x: not a header entry"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "x: not a header entry"),
        ({"x": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}, "x: dtype must be .*I16"),
        ({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "x: dtype must be .*F32"),
        (
            {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "x: expected at bytes 0 to 8",
        ),
        (
            {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "x: expected at bytes 0 to 4",
        ),
    ],
)
def test_a_header_that_does_not_describe_its_data_is_refused(tmp_path, header, message):
    write_safetensors(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=f"x.safetensors: {message}"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_header_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((4).to_bytes(8, "little") + b"\xff{}x")
    with pytest.raises(CheckpointError, match="header is not JSON"):
        read_safetensors(tmp_path / "x.safetensors")


def test_overlapping_tensors_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_safetensors(tmp_path / "x.safetensors", {"x": entry, "y": entry}, bytes(4))
    with pytest.raises(CheckpointError, match="expected at bytes 4 to 8"):
        read_safetensors(tmp_path / "x.safetensors")


# --- tensors that do not fit


def test_missing_unexpected_and_misshapen_tensors_come_in_one_error(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 80), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        qwen3_tg_numpy.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "missing model.norm.weight" in message
    assert "missing model.layers.1.self_attn.q_norm.weight" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.0.mlp.up_proj.weight: expected shape (80, 32), found (32, 80)" in message
    assert message.count("\n") == 4


def test_integers_where_numbers_belong_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.zeros(tensors[name].shape, np.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: expected F32 or F16 or BF16, found I32"):
        qwen3_tg_numpy.load(folder)


def test_an_untied_model_without_its_head_is_refused_and_a_tied_one_ignores_a_stored_head(folder):
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        qwen3_tg_numpy.load(folder)
    change_config(folder, tie_word_embeddings=True)
    before = qwen3_tg_numpy.load(folder).logits([1, 2, 3])
    tensors = {
        name: array.copy() for name, array in load_file(folder / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = np.zeros((211, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert np.array_equal(qwen3_tg_numpy.load(folder).logits([1, 2, 3]), before)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors or model\.safetensors\.index"):
        qwen3_tg_numpy.load(folder)


# --- shards


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "..", "", "a/b"])
def test_an_index_that_names_files_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="weight_map must name files beside it"):
        qwen3_tg_numpy.load(folder)


def test_shards_give_the_same_logits_as_one_file(folder):
    expected = qwen3_tg_numpy.load(folder).logits([5, 6, 7])
    tensors = {
        name: array.copy() for name, array in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert np.array_equal(qwen3_tg_numpy.load(folder).logits([5, 6, 7]), expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards not there: b\.safetensors"):
        qwen3_tg_numpy.load(folder)
    save_file(tensors, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"is in b\.safetensors and before"):
        qwen3_tg_numpy.load(folder)
    index.write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="weight_map must map"):
        qwen3_tg_numpy.load(folder)
