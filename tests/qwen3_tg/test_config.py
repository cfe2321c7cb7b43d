"""What config.json and generation_config.json of released models give, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from text_data import read_data

from qwen3_tg.config import GenerationConfig, ModelConfig, read_json
from qwen3_tg.errors import CheckpointError, UnsupportedError

RELEASED: dict[str, dict[str, Any]] = read_data("qwen3_configs.json")
DENSE = [name for name, raw in RELEASED.items() if raw["model_type"] == "qwen3"]
MOE = [name for name in RELEASED if name not in DENSE]
MIXTURE = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob".split()
MIXTURE += ["decoder_sparse_step", "mlp_only_layers"]
FIELDS = [f for f in ModelConfig.__dataclass_fields__ if f not in (*MIXTURE, "yarn")]


def raw_config(name: str = "Qwen3-0.6B", **changes: Any) -> dict[str, Any]:
    raw = {k: v for k, v in RELEASED[name].items() if k not in ("generation_config", "_meta")}
    return raw | changes


def as_transformers_5(raw: dict[str, Any]) -> dict[str, Any]:
    """The same model as transformers 5.23 writes it: Qwen3Config(**raw).save_pretrained()."""
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return new | {
        "dtype": raw["torch_dtype"],
        "layer_types": ["full_attention"] * raw["num_hidden_layers"],
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": raw["rope_theta"], "rope_type": "default"},
        "transformers_version": "5.23.0",
    }


def test_the_released_models_are_eight_dense_and_six_mixtures():
    assert (len(DENSE), len(MOE)) == (8, 6)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_loads_with_its_own_fields(name):
    raw = raw_config(name)
    config = ModelConfig.from_dict(raw)
    assert {field: getattr(config, field) for field in FIELDS} == {f: raw[f] for f in FIELDS}
    assert type(config.rope_theta) is float
    assert config.yarn is None
    if name in DENSE:
        assert config.num_experts == 0
        assert not any(map(config.is_mixture, range(config.num_hidden_layers)))
    else:
        assert {f: getattr(config, f) for f in MIXTURE} == {
            f: tuple(raw[f]) if f == "mlp_only_layers" else raw[f] for f in MIXTURE
        }
        assert all(map(config.is_mixture, range(config.num_hidden_layers)))


@pytest.mark.parametrize("name", RELEASED)
def test_the_keys_of_transformers_5_give_the_same_model(name):
    raw = raw_config(name)
    assert ModelConfig.from_dict(as_transformers_5(raw)) == ModelConfig.from_dict(raw)


# hidden_size, intermediate_size, layers, heads, key/value heads, tied: Qwen3 Technical Report
# (arXiv 2505.09388), table 1, and the published config.json files
@pytest.mark.parametrize(
    ("name", "shape", "theta"),
    [
        ("Qwen3-0.6B", (1024, 3072, 28, 16, 8, True), 1e6),
        ("Qwen3-1.7B", (2048, 6144, 28, 16, 8, True), 1e6),
        ("Qwen3-4B", (2560, 9728, 36, 32, 8, True), 1e6),
        ("Qwen3-8B", (4096, 12288, 36, 32, 8, False), 1e6),
        ("Qwen3-14B", (5120, 17408, 40, 40, 8, False), 1e6),
        ("Qwen3-32B", (5120, 25600, 64, 64, 8, False), 1e6),
        ("Qwen3-4B-Instruct-2507", (2560, 9728, 36, 32, 8, True), 5e6),
        ("Qwen3-4B-Thinking-2507", (2560, 9728, 36, 32, 8, True), 5e6),
    ],
)
def test_the_shapes_are_those_of_the_technical_report(name, shape, theta):
    c = ModelConfig.from_dict(raw_config(name))
    H, K = c.num_attention_heads, c.num_key_value_heads
    tied = c.tie_word_embeddings
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers, H, K, tied) == shape
    assert (c.rope_theta, c.head_dim, c.vocab_size) == (theta, 128, 151_936)


@pytest.mark.parametrize("name", RELEASED)
def test_the_weights_add_up_to_the_published_parameter_count(name):
    shapes = ModelConfig.from_dict(raw_config(name)).weight_shapes()
    count = RELEASED[name]["_meta"]["parameter_count_from_config"]
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_the_weights_of_a_layer_have_the_checkpoints_names_and_shapes():
    config = ModelConfig.from_dict(
        raw_config(
            vocab_size=96, hidden_size=20, intermediate_size=44, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, head_dim=10, tie_word_embeddings=False,
        )
    )  # fmt: skip
    shapes = config.weight_shapes()
    layer = {
        "input_layernorm": (20,),
        "self_attn.q_proj": (60, 20),
        "self_attn.k_proj": (20, 20),
        "self_attn.v_proj": (20, 20),
        "self_attn.o_proj": (20, 60),
        "self_attn.q_norm": (10,),
        "self_attn.k_norm": (10,),
        "post_attention_layernorm": (20,),
        "mlp.gate_proj": (44, 20),
        "mlp.up_proj": (44, 20),
        "mlp.down_proj": (20, 44),
    }
    assert shapes == {
        "model.embed_tokens.weight": (96, 20),
        **{f"model.layers.{i}.{k}.weight": v for i in range(2) for k, v in layer.items()},
        "model.norm.weight": (20,),
        "lm_head.weight": (96, 20),
    }


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B"])
def test_a_tied_model_has_no_lm_head_of_its_own(name):
    config = ModelConfig.from_dict(raw_config(name))
    assert config.tie_word_embeddings == (name == "Qwen3-0.6B")
    assert ("lm_head.weight" in config.weight_shapes()) == (name == "Qwen3-8B")


def test_a_layer_is_a_mixture_by_its_number_and_the_list():
    config = ModelConfig.from_dict(
        raw_config("Qwen3-30B-A3B", decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=6)
    )
    assert [config.is_mixture(i) for i in range(6)] == [False, True, False, False, False, True]
    shapes = config.weight_shapes()
    assert shapes["model.layers.1.mlp.gate.weight"] == (128, 2048)
    assert shapes["model.layers.1.mlp.experts.gate_proj.weight"] == (128, 768, 2048)
    assert shapes["model.layers.1.mlp.experts.down_proj.weight"] == (128, 2048, 768)
    assert shapes["model.layers.3.mlp.gate_proj.weight"] == (6144, 2048)
    assert "model.layers.3.mlp.gate.weight" not in shapes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": 0}, "num_experts must be a positive integer, found 0"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than num_experts 128"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, found 1"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers must list layers, found '0'"),
        ({"decoder_sparse_step": None}, "decoder_sparse_step must be a positive integer"),
    ],
)
def test_an_impossible_mixture_is_refused(changes, says):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw_config("Qwen3-30B-A3B", **changes))
    assert says in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "model_type must be 'qwen3' or 'qwen3_moe', found 'llama'"),
        ({"model_type": "qwen2"}, "model_type must be 'qwen3' or 'qwen3_moe', found 'qwen2'"),
        ({"model_type": None}, "model_type must be 'qwen3' or 'qwen3_moe', found None"),
        (
            {"architectures": ["Qwen3ForSequenceClassification"]},
            "architectures must be ['Qwen3ForCausalLM'], found ['Qwen3ForSequenceClassification']",
        ),
        ({"architectures": ["Qwen3Model"]}, "architectures must be ['Qwen3ForCausalLM']"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu' (another activation"),
        ({"attention_bias": True}, "attention_bias must be False, found True (biases in the att"),
        ({"use_sliding_window": True}, "use_sliding_window must be False, found True (sliding-"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must all be 'full_attention', found ['full_attention', 'sliding_att",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type must be 'default' or 'y"),
        ({"rope_parameters": YARN | {"ext": 1}}, "rope_parameters: unknown key(s) ext"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "rope_parameters: unknown key(s) partial_rotary_factor",
        ),
        ({"num_experts": 8}, "unknown key(s) num_experts:"),
        ({"zeta": 1, "attn_scale": 2}, "unknown key(s) attn_scale, zeta:"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(changes, says):
    with pytest.raises(UnsupportedError) as caught:
        ModelConfig.from_dict(raw_config(**changes), where="here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SIZES = [f for f in FIELDS if f not in ("rms_norm_eps", "rope_theta", "tie_word_embeddings")]


@pytest.mark.parametrize("value", [0, -1, 1.5, "16", True, None])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_no_positive_integer_is_refused(key, value):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw_config(**{key: value}))
    assert str(caught.value) == f"config.json: {key} must be a positive integer, found {value!r}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, found 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number, found '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, found nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, found inf"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number, found inf"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, found -1"),
        ({"rope_theta": True}, "rope_theta must be a positive number, found True"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number, found 0"),
        ({"rope_parameters": 5}, "rope_parameters must be an object or null, found 5"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling: factor must be at least 1, fo"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor must be a positive num"),
        (
            {"rope_scaling": YARN | {"beta_fast": 0.5}},
            "rope_scaling: beta_fast 0.5 must not be below be",
        ),
        (
            {"rope_scaling": YARN | {"truncate": 1}},
            "rope_scaling: truncate must be true or false, fo",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, found 'yarn'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
        ({"num_attention_heads": 12}, "num_attention_heads 12 is not a multiple of num_key_va"),
        ({"num_key_value_heads": 32}, "num_attention_heads 16 is not a multiple of num_key_va"),
        ({"head_dim": 127}, "head_dim must be even, found 127"),
    ],
)
def test_an_impossible_value_is_refused_with_what_was_found(changes, says):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw_config(**changes))
    assert str(caught.value).startswith(f"config.json: {says}")


@pytest.mark.parametrize(
    "key",
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads""".split(),
)
def test_a_size_that_is_missing_is_named(key):
    raw = raw_config()
    del raw[key]
    with pytest.raises(CheckpointError, match=f"{key} must be a positive integer, found None"):
        ModelConfig.from_dict(raw)


def test_what_may_be_missing_has_the_default_of_transformers():
    defaults = {  # of Qwen3Config in transformers 5.23
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    raw = raw_config("Qwen3-8B", hidden_act="silu")
    left = {k: v for k, v in raw.items() if k not in {*defaults, "hidden_act", "attention_bias"}}
    config = ModelConfig.from_dict(left)
    assert {key: getattr(config, key) for key in defaults} == defaults
    assert config.hidden_size == 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e6}},
        {"rope_theta": 5e6, "rope_parameters": None, "rope_scaling": None},
        {"rope_theta": 5e6, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_the_base_inside_the_rope_object_wins_over_the_one_outside(changes):
    assert ModelConfig.from_dict(raw_config(**changes)).rope_theta == 5e6


def test_keys_that_change_nothing_change_nothing():
    harmless = {
        "torch_dtype": "float32", "use_cache": False, "attention_dropout": 0.1, "max_length": 20,
        "sliding_window": 4096, "max_window_layers": 1, "temperature": 0.3, "architectures": None,
        "quantization_config": None, "layer_types": None, "_name_or_path": "x", "id2label": {},
    }  # fmt: skip
    assert ModelConfig.from_dict(raw_config(**harmless)) == ModelConfig.from_dict(raw_config())


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_generation_config_gives_its_end_tokens_and_advice(name):
    raw = RELEASED[name]["generation_config"]
    found = GenerationConfig.from_dicts(raw, RELEASED[name], "generation_config.json")
    assert found == GenerationConfig(
        eos_token_ids=(151645, 151643),
        temperature=0.7 if "Instruct" in name else 0.6,
        top_p=0.8 if "Instruct" in name else 0.95,
        top_k=20,
        min_p=0.0,
    )


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, (5,)),
        ({"eos_token_id": 0}, {"eos_token_id": 7}, (0,)),  # 0 is a token like any other
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": []}, {"eos_token_id": 7}, ()),
        ({}, {"eos_token_id": None}, ()),
        ({}, {}, ()),
    ],
)
def test_the_end_tokens_are_those_of_generation_config_or_else_of_config(
    generation, config, expected
):
    assert GenerationConfig.from_dicts(generation, config, "x").eos_token_ids == expected


def test_without_a_generation_config_the_advice_is_that_for_thinking():
    found = GenerationConfig.from_dicts({}, {}, "x")
    # GitHub QwenLM/Qwen3, quickstart: temperature 0.6, top_p 0.95, top_k 20, min_p 0
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.95, 20, 0.0)
    assert GenerationConfig.from_dicts({"temperature": None, "top_k": None}, {}, "x") == found


def test_do_sample_false_is_temperature_zero_whatever_else_is_said():
    found = GenerationConfig.from_dicts({"do_sample": False, "temperature": 0.7}, {}, "x")
    assert found.temperature == 0
    assert GenerationConfig.from_dicts({"do_sample": True, "temperature": 0.7}, {}, "x") == (
        GenerationConfig(temperature=0.7)
    )


def test_a_hybrid_model_that_does_not_think_is_sampled_as_qwen_advises():
    """Qwen3's model cards: 0.6 and 0.95 with thinking, 0.7 and 0.8 without, 20 for both."""
    found = GenerationConfig(eos_token_ids=(7,)).without_thinking()
    assert found == GenerationConfig(eos_token_ids=(7,), temperature=0.7, top_p=0.8)
    own = GenerationConfig(temperature=0.5)
    assert own.without_thinking() == own


def test_a_repetition_penalty_is_taken_from_the_generation_config():
    found = GenerationConfig.from_dicts({"repetition_penalty": 1.05}, {}, "x")
    assert (found.repetition_penalty, found.not_applied) == (1.05, ())
    with pytest.raises(CheckpointError, match="repetition_penalty must be above 0"):
        GenerationConfig.from_dicts({"repetition_penalty": 0}, {}, "x")


def test_wishes_of_the_generation_config_that_are_not_computed_are_told():
    wishes = {"encoder_repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]]}
    assert GenerationConfig.from_dicts(wishes, {}, "x").not_applied == (
        "encoder_repetition_penalty 1.05",
        "no_repeat_ngram_size 3",
        "bad_words_ids [[1]]",
    )
    harmless = {
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": None,
    }
    assert GenerationConfig.from_dicts(harmless, {}, "x").not_applied == ()


@pytest.mark.parametrize("value", [-1, "0.6", True, [0.6], float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "min_p"])
def test_a_wrong_number_in_the_generation_config_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError) as caught:
        GenerationConfig.from_dicts({key: value}, {}, "here/generation_config.json")
    assert str(caught.value).startswith(f"here/generation_config.json: {key} must be a ")
    assert str(caught.value).endswith(f"found {value!r}")


@pytest.mark.parametrize("value", ["1", [1, "x"], -1, [-1], 1.5, [[1]], {"a": 1}, True, False])
def test_end_tokens_that_are_no_ids_are_refused(value):
    with pytest.raises(CheckpointError, match=r"^here: eos_token_id must hold token ids, found"):
        GenerationConfig.from_dicts({"eos_token_id": value}, {}, "here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file; it is needed"),
        (b"", "not readable as JSON"),
        (b'{"a": 1', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"1" * 5000, "not readable as JSON"),
    ],
    ids=["missing", "empty", "cut off", "not UTF-8", "list", "null", "too deep", "too long"],
)
def test_a_file_that_is_no_json_object_is_refused_by_its_path(tmp_path, content, says):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_a_json_object_is_read_as_utf8(tmp_path):
    (tmp_path / "x.json").write_bytes(json.dumps({"é": "中"}, ensure_ascii=False).encode())
    assert read_json(tmp_path / "x.json") == {"é": "中"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_p", 0), ("top_p", 1.5), ("min_p", 2), ("top_k", 2.5), ("do_sample", 0)],
)
def test_a_generation_config_that_cannot_be_meant_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError, match=f"^here: {key} must be "):
        GenerationConfig.from_dicts({key: value}, {}, "here")
