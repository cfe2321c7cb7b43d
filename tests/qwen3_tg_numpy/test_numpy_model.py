"""The reference against what Hugging Face transformers recorded, and against hand calculation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import qwen3_tg_numpy
from qwen3_tg_numpy import KVCache, ModelConfig, Reference, model, rope
from qwen3_tg_numpy.config import Yarn

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())

# float32 against float32 with another order of summation. Measured on x86-64 (numpy's OpenBLAS
# against torch): logits differ by at most 2.2e-5 at a standard deviation of 1.0, hidden states by
# 2.3e-5, splits by 9.5e-6. Every mistake tried below makes a difference of at least 2.
GOLDEN_TOLERANCE = 1e-4
SPLIT_TOLERANCE = 5e-5

MLP_STEPS = "mlp.gate_proj mlp.up_proj mlp.act mlp.down_proj".split()
MOE_STEPS = "mlp.gate mlp.topk_ids mlp.topk_weights mlp.experts".split()
ATTENTION_STEPS = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm "
    "self_attn.k_norm self_attn.q_rope self_attn.k_rope self_attn.scores self_attn.probs "
    "self_attn.mix self_attn.o_proj residual post_attention_layernorm"
).split()


def load(case: str) -> tuple[Reference, dict[str, np.ndarray]]:
    with np.load(GOLDEN / case / "golden.npz") as golden:
        return qwen3_tg_numpy.load(GOLDEN / case), dict(golden)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == np.float32, what
    error = np.abs(found - expected)
    relative = error.max() / np.abs(expected).max()
    agree = np.mean(found.argmax(-1) == expected.argmax(-1))
    assert error.max() <= tolerance, (
        f"{what}: max abs {error.max():.2e} (allowed {tolerance:.0e}), relative to the largest "
        f"value {relative:.2e}, argmax agreement {agree:.1%}"
    )


def tiny_config(**changes: object) -> ModelConfig:
    sizes = {"H": 1, "K": 1, "Hd": 2} | changes
    return ModelConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["K"],
        head_dim=sizes["Hd"],
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )


# --- the ladder, by hand


def test_rms_norm_of_3_and_4_divides_by_the_root_of_twelve_and_a_half():
    norm = model.RMSNorm(np.array([1, 2], np.float32), eps=0.0)
    found = norm(np.array([[3, 4]], np.float32))
    assert_close(found, np.array([[3, 8]]) / np.sqrt(12.5), 1e-6, "norm")


def test_rms_norm_adds_eps_under_the_root_so_that_zeros_stay_zeros():
    norm = model.RMSNorm(np.array([1, 1], np.float32), eps=0.25)
    assert norm(np.zeros((1, 2), np.float32)).tolist() == [[0, 0]]
    found = norm(np.array([[0.5, 0.5]], np.float32))
    assert_close(found, np.array([[0.5, 0.5]]) / np.sqrt(0.5), 1e-6, "norm")


def test_rope_leaves_position_0_alone_and_turns_pair_0_by_one_radian_a_position():
    config = tiny_config(Hd=4)
    cos, sin = model.rope_table(config, np.array([0, 2]))
    x = np.tile(np.array([1, 10, 0, 0], np.float32), (2, 1, 1))  # pairs are (0, 2) and (1, 3)
    slow = 2 * 1e6**-0.5
    turned = [np.cos(2), 10 * np.cos(slow), np.sin(2), 10 * np.sin(slow)]
    assert_close(model.apply_rope(x, cos, sin), np.array([[[1, 10, 0, 0]], [turned]]), 1e-6, "rope")


def test_rope_makes_dot_products_depend_on_distance_alone():
    config = tiny_config(Hd=8)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 8)).astype(np.float32)

    def dot(q_pos: int, k_pos: int) -> float:
        a = model.apply_rope(q, *model.rope_table(config, np.array([q_pos])))
        b = model.apply_rope(k, *model.rope_table(config, np.array([k_pos])))
        return float((a * b).sum())

    assert dot(9, 4) == pytest.approx(dot(25, 20), abs=1e-5)
    assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)


def test_int8_makes_the_largest_of_a_head_127_and_rounds_the_others_to_even():
    x = np.array([[254, -3, 1, 2], [0, 0, 0, 0], [-1, 1, 0.5, 0]], np.float32)
    q, scale = model.quantise(x)
    assert q.tolist() == [[127, -2, 0, 1], [0, 0, 0, 0], [-127, 127, 64, 0]]  # 63.5 is a tie
    assert scale.tolist() == pytest.approx([2, 0, 1 / 127])
    read = model.dequantise(q, scale)
    assert read.dtype == np.float32 and read[0].tolist() == pytest.approx([254, -4, 0, 2])


def test_an_int8_cache_goes_on_where_it_ended_and_changes_nothing_it_holds():
    reference, golden = load("tied_float32")
    ids = golden["ids"]
    whole = KVCache(reference.config, int8=True)
    expected = reference.model.forward(ids, whole)
    for split in (1, 7):
        parts = KVCache(reference.config, int8=True)
        found = [reference.model.forward(part, parts) for part in (ids[:split], ids[split:])]
        assert parts.length == len(ids) and parts.layers[0].k.dtype == np.int8
        assert np.abs(parts.layers[1].k.astype(int) - whole.layers[1].k).max() <= 1
        # a tie that rounding moves makes a difference of a step
        assert_close(np.concatenate(found), expected, 5e-3, f"split at {split}")
    assert np.abs(expected - golden["logits"]).max() > 1e-3


def test_softmax_and_silu_stand_extreme_numbers():
    with np.errstate(all="raise", under="ignore"):
        probs = model.softmax(np.array([[1000.0, 1000.0, -np.inf]], np.float32))
        assert probs.tolist() == [[0.5, 0.5, 0.0]]
        values = model.silu(np.array([-1000.0, 0.0, 1000.0], np.float32))
        assert values.tolist() == [0.0, 0.0, 1000.0]
    one = model.silu(np.array([1.0], np.float32))
    assert one[0] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-7)


def attention(config: ModelConfig, **weights: np.ndarray) -> model.Attention:
    """Attention with zero weights (norms one) but for those given."""
    shapes = config.weight_shapes()
    name = "layers.0.self_attn"
    stored = {
        key: np.zeros(shape, np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
        for key, shape in shapes.items()
    }
    stored |= {f"model.{name}.{key}.weight": value for key, value in weights.items()}
    return model.Attention(config, stored, name)


def test_attention_without_preference_averages_the_values_so_far():
    config = tiny_config(Hd=4)
    eye = np.eye(4, dtype=np.float32)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = attention(config, v_proj=eye, o_proj=eye)(
        x, model.LayerCache(config), 0, model.no_trace
    )
    means = np.cumsum(x, axis=0) / np.arange(1, 6)[:, None]
    assert_close(found, means, 1e-6, "attention")


def test_query_heads_that_share_a_key_value_head_are_neighbours():
    config = tiny_config(H=4, K=2, Hd=2)
    seen: dict[str, np.ndarray] = {}
    x = np.array([[1, 2, 3, 4]], np.float32)
    layer = attention(config, v_proj=np.eye(4, dtype=np.float32))
    layer(x, model.LayerCache(config), 0, lambda name, value: seen.setdefault(name, value))
    # value head 0 is (1, 2), head 1 is (3, 4)
    assert seen["layers.0.self_attn.mix"].tolist() == [[1, 2, 1, 2, 3, 4, 3, 4]]


def test_mlp_is_down_of_silu_of_gate_times_up():
    weights = {
        "model.mlp.gate_proj.weight": np.array([[1.0], [0.0]], np.float32),
        "model.mlp.up_proj.weight": np.array([[3.0], [1.0]], np.float32),
        "model.mlp.down_proj.weight": np.array([[1.0, 7.0]], np.float32),
    }
    found = model.MLP(weights, "mlp")(np.array([[2.0]], np.float32), model.no_trace)
    assert found[0, 0] == pytest.approx(2 / (1 + np.exp(-2)) * 6, abs=1e-5)


def mixture(norm_topk_prob: bool, router: list[list[float]]) -> model.MoE:
    """Three experts on one number; expert e gives silu(x) * x * 10 ** e. Each token takes two."""
    config = dataclasses.replace(
        tiny_config(),
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=1,
        norm_topk_prob=norm_topk_prob,
    )
    weights = {"model.mlp.gate.weight": np.array(router, np.float32)}
    for e in range(3):
        for name, value in {"gate_proj": 1, "up_proj": 1, "down_proj": 10**e}.items():
            weights[f"model.mlp.experts.{e}.{name}.weight"] = np.array([[value]], np.float32)
    return model.MoE(config, weights, "mlp")


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_mixture_adds_up_its_most_likely_experts(norm_topk_prob):
    seen: dict[str, np.ndarray] = {}
    x = np.array([[2.0], [-2.0]], np.float32)
    layer = mixture(norm_topk_prob, [[0.0], [1.0], [2.0]])
    found = layer(x, lambda name, value: seen.setdefault(name, value))
    # logits 0, 2, 4 and 0, -2, -4
    p = np.exp([4.0, 2.0]) / np.exp([0.0, 2.0, 4.0]).sum()
    q = np.exp([0.0, -2.0]) / np.exp([0.0, -2.0, -4.0]).sum()
    if norm_topk_prob:
        p, q = p / p.sum(), q / q.sum()
    assert seen["mlp.topk_ids"].tolist() == [[2, 1], [0, 1]]
    assert_close(seen["mlp.topk_weights"], np.array([p, q]), 1e-6, "weights")
    a, b = (v / (1 + np.exp(-v)) * v for v in (2.0, -2.0))
    expected = np.array([[a * (100 * p[0] + 10 * p[1])], [b * (q[0] + 10 * q[1])]])
    assert_close(found, expected, 1e-4, "mixture")


def test_the_lower_expert_comes_first_on_a_tie():
    seen: dict[str, np.ndarray] = {}
    mixture(True, [[1.0], [1.0], [1.0]])(
        np.array([[1.0]], np.float32), lambda name, value: seen.setdefault(name, value)
    )
    assert seen["mlp.topk_ids"].tolist() == [[0, 1]]
    assert seen["mlp.topk_weights"].tolist() == [[0.5, 0.5]]


def yarn_config(**changes: object) -> ModelConfig:
    """Pairs at frequencies 10 ** -i, i = 0..7, and an original length of 2000 pi: pair i turns
    1000 * 10 ** -i times within it."""
    numbers = {"factor": 4.0, "attention_factor": 1.5, "beta_fast": 100.0, "beta_slow": 0.1}
    yarn = Yarn(original_max_position_embeddings=round(2000 * np.pi), **numbers | changes)
    return dataclasses.replace(tiny_config(Hd=16), rope_theta=1e8, yarn=yarn)


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_goes_from_one_to_the_other_between():
    found, factor = rope.frequencies(yarn_config(truncate=False))
    ramp = np.array([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])  # from pair 1 (100 turns) to 4 (a tenth)
    expected = 10.0 ** -np.arange(8) * (1 - ramp + ramp / 4)
    assert np.abs(found / expected - 1).max() < 1e-4  # the length is a whole number
    assert factor == 1.5


def test_yarn_rounds_the_ends_of_its_ramp_outwards():
    found, _ = rope.frequencies(yarn_config(beta_fast=50.0, beta_slow=0.2))  # pairs 1.3 to 3.7
    expected, _ = rope.frequencies(yarn_config(truncate=False))
    assert np.abs(found / expected - 1).max() < 1e-4


def test_yarn_multiplies_cosine_and_sine_by_its_attention_factor():
    plain = yarn_config(factor=1.0, attention_factor=1.0)
    positions = np.arange(5)
    for found, expected in zip(
        model.rope_table(yarn_config(factor=1.0), positions),
        model.rope_table(plain, positions),
        strict=True,
    ):
        assert_close(found, expected * np.float32(1.5), 1e-6, "table")


def test_a_matrix_taller_than_one_decoded_part_gives_the_same_product(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    matrix = model.Linear(rng.normal(size=(10, 4)).astype(np.float32))
    whole = matrix(x)
    monkeypatch.setattr(model.Linear, "ROWS", 4)
    assert_close(matrix(x), whole, 1e-6, "linear")


# --- against transformers


def test_the_golden_cases_cover_what_differs_between_checkpoints():
    configs = [qwen3_tg_numpy.load(GOLDEN / case).config for case in CASES]
    raws = [json.loads((GOLDEN / case / "config.json").read_text()) for case in CASES]
    heads = [(c.num_attention_heads, c.num_key_value_heads, c.head_dim) for c in configs]
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert {c.rope_theta for c in configs} >= {1e6, 5e6}
    assert {H == K for H, K, _ in heads} == {True, False}
    assert {h[0] * h[2] == c.hidden_size for h, c in zip(heads, configs, strict=True)} == {
        True,
        False,
    }
    dtypes = {raw.get("torch_dtype") or raw.get("dtype") for raw in raws}
    assert dtypes == {"float32", "float16", "bfloat16"}
    assert {"rope_theta" in raw for raw in raws} == {True, False}  # transformers 4 and 5
    sharded = {(GOLDEN / case / "model.safetensors.index.json").exists() for case in CASES}
    assert sharded == {True, False}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    reference, golden = load(case)
    found = reference.logits(golden["ids"])
    assert_close(found, golden["logits"], GOLDEN_TOLERANCE, case)
    assert (found.argmax(-1) == golden["logits"].argmax(-1)).all()


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_every_layer_are_those_of_transformers(case):
    reference, golden = load(case)
    trace = reference.trace(golden["ids"])
    layers = [f"layers.{i}" for i in range(reference.config.num_hidden_layers)]
    for name in ["embed_tokens", *layers, "norm"]:
        assert_close(trace[name], golden[name], GOLDEN_TOLERANCE, f"{case}: {name}")


@pytest.mark.parametrize("case", [case for case in CASES if (GOLDEN / case / "trace.npz").exists()])
def test_every_intermediate_is_that_of_transformers(case):
    folder = GOLDEN / case
    with np.load(folder / "trace.npz") as golden, np.load(folder / "golden.npz") as whole:
        length = len(golden["embed_tokens"])
        trace = qwen3_tg_numpy.load(folder).trace(whole["ids"][:length])
        assert set(golden) == {name for name in trace if not name.endswith(".residual")}
        for name in golden:
            if name.endswith(".topk_ids"):
                assert np.array_equal(trace[name], golden[name]), name
            else:
                assert_close(trace[name], golden[name], GOLDEN_TOLERANCE, name)


@pytest.mark.parametrize("case", CASES)
def test_the_trace_names_every_step_once_in_order(case):
    reference, golden = load(case)
    names: list[str] = []

    def keep(name: str, value: np.ndarray) -> np.ndarray:
        names.append(name)
        return value

    reference.model.forward(golden["ids"][:3], trace=keep)
    expected = ["embed_tokens"]
    for i in range(reference.config.num_hidden_layers):
        steps = ATTENTION_STEPS + (MOE_STEPS if reference.config.is_mixture(i) else MLP_STEPS)
        expected += [f"layers.{i}.{step}" for step in steps] + [f"layers.{i}"]
    assert names == [*expected, "norm", "lm_head"]
    assert list(reference.trace(golden["ids"][:3])) == names


def swap_qk_norms(reference: Reference) -> None:
    for layer in reference.model.layers:
        attn = layer.self_attn
        attn.q_norm, attn.k_norm = attn.k_norm, attn.q_norm


def swap_gate_and_up(reference: Reference) -> None:
    for layer in reference.model.layers:
        for mlp in getattr(layer.mlp, "experts", [layer.mlp]):
            mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def swap_layer_norms(reference: Reference) -> None:
    for layer in reference.model.layers:
        a, b = layer.input_layernorm, layer.post_attention_layernorm
        layer.input_layernorm, layer.post_attention_layernorm = b, a


def exchange_rope_theta(reference: Reference) -> None:
    other = reference.config.rope_theta * 5
    for layer in reference.model.layers:
        layer.self_attn.config = dataclasses.replace(reference.config, rope_theta=other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "mistake", [swap_qk_norms, swap_gate_and_up, swap_layer_norms, exchange_rope_theta]
)
def test_the_golden_values_notice_a_mistake(case, mistake):
    reference, golden = load(case)
    mistake(reference)
    error = np.abs(reference.logits(golden["ids"]) - golden["logits"]).max()
    assert error > 1000 * GOLDEN_TOLERANCE, f"{case}: only {error:.1e} from the golden logits"


def interleaved_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape)


@pytest.mark.parametrize("case", CASES)
def test_the_golden_values_notice_interleaved_rotation(case, monkeypatch):
    monkeypatch.setattr(model, "apply_rope", interleaved_rope)
    reference, golden = load(case)
    error = np.abs(reference.logits(golden["ids"]) - golden["logits"]).max()
    assert error > 1000 * GOLDEN_TOLERANCE, f"{case}: only {error:.1e} from the golden logits"


# --- the cache


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("splits", ["all in ones", (1,), (-1,), (17,), (2, 3, 30), (16, 32)])
def test_cached_logits_equal_uncached_at_any_split(case, splits):
    reference, golden = load(case)
    ids = golden["ids"]
    cache = KVCache(reference.config)
    starts = range(1, len(ids)) if isinstance(splits, str) else splits
    parts = [reference.model.forward(part, cache) for part in np.split(ids, list(starts))]
    assert cache.length == len(ids)
    assert_close(np.concatenate(parts), reference.logits(ids), SPLIT_TOLERANCE, f"{case} {splits}")


def test_the_trace_of_a_continuation_is_the_end_of_the_whole_trace():
    reference, golden = load("untied_bfloat16")
    ids, start_pos = golden["ids"], 29
    whole, cache = reference.trace(ids), KVCache(reference.config)
    reference.model.forward(ids[:start_pos], cache)
    rest: dict[str, np.ndarray] = {}
    reference.model.forward(
        ids[start_pos:], cache, trace=lambda name, value: rest.setdefault(name, value)
    )
    assert list(rest) == list(whole)
    for name, value in whole.items():
        by_head = name.endswith((".scores", ".probs"))  # (H, S, T)
        expected = value[:, start_pos:] if by_head else value[start_pos:]
        assert_close(rest[name], expected, SPLIT_TOLERANCE, name)


def test_later_tokens_do_not_change_earlier_logits():
    reference, golden = load("sharded_bfloat16")
    ids = golden["ids"].copy()
    before = reference.logits(ids)
    ids[40:] = (ids[40:] + 1) % reference.config.vocab_size
    after = reference.logits(ids)
    assert_close(after[:40], before[:40], SPLIT_TOLERANCE, "earlier logits")
    assert np.abs(after[40:] - before[40:]).max() > 0.1


def test_probabilities_sum_to_one_over_visible_positions_only():
    reference, golden = load("multi_head_float16")
    probs = reference.trace(golden["ids"])["layers.1.self_attn.probs"]
    assert np.abs(probs.sum(-1) - 1).max() < 1e-6
    assert (np.triu(probs, k=1) == 0).all()


# --- what ids may be


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one id"),
        ([[1, 2]], "one sequence"),
        ([1, -1], "0 to 210 .* found -1"),
        ([211], "0 to 210 .* found 211"),
        ([1.0], "integers"),
        ([0] * 129, "129 tokens do not fit: max_position_embeddings is 128"),
    ],
)
def test_ids_that_cannot_be_a_text_are_refused(ids, message):
    reference = qwen3_tg_numpy.load(GOLDEN / "tied_float32")
    with pytest.raises(ValueError, match=message):
        reference.logits(ids)
    with pytest.raises(ValueError, match=message):
        reference.trace(ids)
    with pytest.raises(ValueError, match=message):
        reference.generate_ids(ids, max_new_tokens=1)


def test_a_cache_takes_max_position_embeddings_positions_and_no_more():
    reference = qwen3_tg_numpy.load(GOLDEN / "tied_float32")
    cache = KVCache(reference.config)
    reference.model.forward([1] * 127, cache)
    with pytest.raises(ValueError, match="129 tokens do not fit"):
        reference.model.forward([1, 1], cache)
    reference.model.forward([1], cache)
    assert cache.length == 128
