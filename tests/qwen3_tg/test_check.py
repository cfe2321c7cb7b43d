"""`qwen3 check`: right computations are called right, and a planted fault is named."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from format_writers import random_model, write_awq, write_fp8, write_gguf, write_gptq, write_mlx
from qwen3_tg_cpu import kernels, library

from qwen3_tg import device as devices
from qwen3_tg import kv_cache, model
from qwen3_tg.check import lowered
from qwen3_tg.check.run import WRONG, Report, check
from qwen3_tg.cli import main

CHUNK, PROMPT = 4, 6  # more than a chunk, and few kernels to compile


def small(**how: Any) -> devices.Policy:
    policy = devices.choose("CPU", **how)
    return replace(policy, prefill_chunk=CHUNK)


def checked(name: str, **how: Any) -> Report:
    return check(str(GOLDEN / name), small(**how), tokens=PROMPT)


def largest(report: Report) -> float:
    return max(step.times for layer in report.layers for step in layer.steps)


@pytest.mark.parametrize("how", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["untied_bfloat16", "moe_bfloat16"])
def test_what_is_right_is_called_right(name: str, how: dict[str, Any]) -> None:
    report = checked(name, kernels="generic", **how)
    assert report.renderer == "ClangRenderer" and report.policy.device == "CPU"
    assert report.first_wrong is None
    assert largest(report) < WRONG / 2  # there is room
    assert report.same_token
    last = report.layers[-1]
    assert last.grown < 4 * last.expected
    assert [layer.name for layer in report.layers] == [
        *("embed_tokens", "layers.0", "layers.1", "lm_head")
    ]


@pytest.mark.parametrize("how", ["fast", "exact"])
@pytest.mark.parametrize("name", ["untied_bfloat16", "moe_mixed_float32", "yarn_v4_bfloat16"])
def test_the_cpus_own_kernels_are_right(name: str, how: str) -> None:
    report = check(str(GOLDEN / name), devices.choose("CPU", kernels=how), tokens=40)
    assert report.first_wrong is None
    assert largest(report) < WRONG / 1.5
    assert report.yarn == name.startswith("yarn")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("untied_bfloat16", "fast"),
        ("moe_bfloat16", "fast"),
        ("untied_bfloat16", "generic"),
        ("untied_bfloat16", "bfloat16"),
    ],
)
def test_a_cache_in_int8_is_right_and_off_by_what_its_steps_make(name: str, how: str) -> None:
    if how == "fast":
        policy = devices.choose("CPU", kernels="fast", kv_dtype="int8")
        report = check(str(GOLDEN / name), policy, tokens=40)
    else:
        dtype = {} if how == "generic" else {"dtype": how}
        report = checked(name, kernels="generic", kv_dtype="int8", **dtype)
    assert report.first_wrong is None
    assert largest(report) < WRONG / 1.5
    last = report.layers[-1]
    assert 1e-3 < last.grown < 4 * last.expected < 0.2


def test_what_int8_costs_the_embedded_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("check --device CPU --kv-dtype int8 --tokens 40".split()) == 0
    out = capsys.readouterr().out
    assert "cache int8, fast kernels" in out and "computes this model right" in out
    grown, expected = map(float, re.findall(r"\d\.\de-\d\d", out))
    assert 1e-3 < grown < 4 * expected < 0.05


def test_a_fault_of_int8_in_tinygrads_lowering_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = faulty(kv_cache, "return q.float() * scale", "return q.float() * 1.1 * scale")
    monkeypatch.setattr(lowered, "LayerCache", made.LayerCache)
    wrong = checked("untied_bfloat16", kernels="generic", kv_dtype="int8").first_wrong
    assert wrong is not None and wrong.name == "layers.0.self_attn.scores"


def test_a_context_beyond_the_models_own_is_checked_with_yarn() -> None:
    longest = 4 * 64
    report = check(str(GOLDEN / "tied_float32"), small(), context=longest, tokens=PROMPT)
    assert report.yarn and report.first_wrong is None


FORMATS = {
    **{
        type: lambda path, config, weights, type=type: write_gguf(
            path / "model.gguf", config, weights, type
        )
        for type in ("Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XS")
    },
    "AWQ": write_awq,
    "GPTQ": write_gptq,
    "FP8": write_fp8,
    "MLX": write_mlx,
}


def written(name: str, moe: bool, folder: Path) -> str:
    """A random model stored so: its file or folder."""
    config, weights = random_model(moe)
    FORMATS[name](folder, config, weights)
    file = folder / "model.gguf"
    return str(file if file.exists() else folder)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_stored_weight_is_right(name: str, moe: bool, tmp_path: Path) -> None:
    report = check(written(name, moe, tmp_path), devices.choose("CPU", kernels="fast"), tokens=40)
    assert name in report.formats
    assert report.first_wrong is None
    assert largest(report) < WRONG / 1.5


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "AWQ"])
def test_stored_weights_are_right_by_tinygrads_lowering(name: str, tmp_path: Path) -> None:
    report = check(written(name, False, tmp_path), small(kernels="generic"), tokens=PROMPT)
    assert report.first_wrong is None
    assert largest(report) < WRONG / 1.5


def faulty(module: ModuleType, old: str, new: str) -> ModuleType:
    """A module with a mistake in its text."""
    text = inspect.getsource(module)
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    made = ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(compile(text.replace(old, new), str(module.__file__), "exec"), made.__dict__)
    return made


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    def planted(old: str, new: str) -> None:
        made = faulty(model, old, new)
        monkeypatch.setattr(lowered, "Block", made.Block)
        monkeypatch.setattr(lowered, "RMSNorm", made.RMSNorm)

    return planted


DENSE_FAULTS = [
    ("input_layernorm", "+ self.eps).rsqrt()", "+ self.eps).rsqrt() * 1.001"),
    ("self_attn.q_proj", "self.q_proj(x))", "self.q_proj(x) * 1.001)"),
    ("self_attn.k_proj", "self.k_proj(x))", "self.k_proj(x) * 1.001)"),
    ("self_attn.v_proj", "self.v_proj(x))", "self.v_proj(x) * 1.001)"),
    ("self_attn.q_norm", 'see("q_norm", self.q_norm(q))', 'see("q_norm", self.k_norm(q))'),
    ("self_attn.k_norm", 'see("k_norm", self.k_norm(k))', 'see("k_norm", self.q_norm(k))'),
    ("self_attn.q_rope", "apply_rope(q, rope, start_pos)", "apply_rope(q, rope, start_pos + 1)"),
    ("self_attn.k_rope", "apply_rope(k, rope, start_pos)", "apply_rope(k, -rope, start_pos)"),
    ("self_attn.scores", "* Hd**-0.5)", "* Hd**-0.501)"),
    ("self_attn.probs", "(key_pos <= query_pos)", "(key_pos <= query_pos + 1)"),
    ("self_attn.probs", "scores.softmax(axis=-1)", "scores.softmax(axis=-1) * 1.001"),
    ("self_attn.mix", "probs.dot(v.float())", "probs.dot(v.float() * 1.001)"),
    ("self_attn.o_proj", "self.o_proj(mix)", "(self.o_proj(mix) * 1.001)"),
    ("residual", "x + self.self_attn(", "x * 1.001 + self.self_attn("),
    ("post_attention_layernorm", "self.post_attention_layernorm(h))", "self.input_layernorm(h))"),
    ("mlp.gate_proj", 'see("gate_proj", self.gate_proj(x))', 'see("gate_proj", self.up_proj(x))'),
    ("mlp.up_proj", 'see("up_proj", self.up_proj(x))', 'see("up_proj", self.gate_proj(x))'),
    ("mlp.act", "gate.silu() * up)", "gate.sigmoid() * up)"),
    (
        "mlp.down_proj",
        'see("down_proj", self.down_proj(',
        'see("down_proj", 1.001 * self.down_proj(',
    ),
    ("out", "return h + self.mlp(normed, see)", "return h * 1.001 + self.mlp(normed, see)"),
]
MOE_FAULTS = [
    ("mlp.gate", 'see("gate", self.gate(x))', 'see("gate", self.gate(x) * 1.001)'),
    ("mlp.topk_ids", "(other > mine)", "(other < mine)"),
    ("mlp.topk_weights", "if self.norm_topk_prob:", "if not self.norm_topk_prob:"),
    ("mlp.experts", "out.float() * weights", "out.float() * 1.001 * weights"),
]


@pytest.mark.long
@pytest.mark.parametrize(("step", "old", "new"), DENSE_FAULTS, ids=[f[0] for f in DENSE_FAULTS])
def test_a_fault_in_a_step_is_named(plant: Any, step: str, old: str, new: str) -> None:
    plant(old, new)
    wrong = checked("untied_bfloat16", kernels="generic").first_wrong
    assert wrong is not None and wrong.name == f"layers.0.{step}"
    assert not wrong.joined


@pytest.mark.long
@pytest.mark.parametrize(("step", "old", "new"), MOE_FAULTS, ids=[f[0] for f in MOE_FAULTS])
def test_a_fault_of_the_experts_is_named(plant: Any, step: str, old: str, new: str) -> None:
    plant(old, new)
    wrong = checked("moe_bfloat16", kernels="generic").first_wrong
    assert wrong is not None and wrong.name == f"layers.0.{step}"


def test_a_fault_in_one_layer_is_named_with_it(plant: Any) -> None:
    plant(
        'name, eps = f"model.layers.{layer}", config.rms_norm_eps',
        'name, eps = f"model.layers.{layer}", config.rms_norm_eps + (layer == 1) * 0.1',
    )
    report = checked("untied_bfloat16", kernels="generic")
    assert report.first_wrong and report.first_wrong.name == "layers.1.input_layernorm"
    assert not report.layers[1].wrong
    assert report.layers[-1].grown > 10 * report.layers[-1].expected


def test_a_fault_where_steps_are_joined_is_named_with_the_step(plant: Any) -> None:
    plant("gate.silu() * up)", "gate.silu() * up * (1 if gate.uop.is_realized else 1.01))")
    wrong = checked("untied_bfloat16", kernels="generic").first_wrong
    assert wrong and (wrong.name, wrong.joined) == ("layers.0.mlp.act", True)


@pytest.mark.parametrize(
    ("step", "where", "change"),
    [
        ("embed_tokens", "Embedding", lambda out: out * 1.001),
        ("norm", "RMSNorm", lambda out: out * 1.001),
        ("lm_head", "Linear", lambda out: out + 0.01),
    ],
)
def test_a_fault_before_and_behind_the_layers_is_named(
    monkeypatch: pytest.MonkeyPatch, step: str, where: str, change: Any
) -> None:
    class Faulty(getattr(lowered, where)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            return change(super().__call__(*args))

    monkeypatch.setattr(lowered, where, Faulty)
    wrong = checked("untied_bfloat16", kernels="generic").first_wrong
    assert wrong is not None and wrong.name == step


def test_what_is_not_a_number_is_wrong(plant: Any) -> None:
    plant("probs.dot(v.float())", 'probs.dot(v.float() * float("nan"))')
    wrong = checked("untied_bfloat16", kernels="generic").first_wrong
    assert wrong and wrong.name == "layers.0.self_attn.mix" and wrong.times == np.inf


# What the CPU's own kernels do together has the name of the last step in it.
C_FAULTS = [
    ("embed_tokens", "untied_bfloat16", "floats(&m, ids[s], 0", "floats(&m, ids[s] ^ 1, 0"),
    (
        "layers.0.input_layernorm",
        "untied_bfloat16",
        "__builtin_sqrtf(total / (float)n + eps)",
        "__builtin_sqrtf(total / (float)n + 1.1f * eps + 0.01f)",
    ),
    (
        "layers.0.self_attn.q_rope",
        "untied_bfloat16",
        "norm_and_turn(x, at(t, 12)",
        "norm_and_turn(x, at(t, 13)",
    ),
    (
        "layers.0.self_attn.k_rope",
        "untied_bfloat16",
        "norm_and_turn(x, at(t, 13)",
        "norm_and_turn(x, at(t, 12)",
    ),
    (
        "layers.0.residual",
        "untied_bfloat16",
        "to.added[place + i] + sums[i]",
        "to.added[place + i] + 1.01f * sums[i]",
    ),
    (
        "layers.0.mlp.act",
        "untied_bfloat16",
        "silu8(load(sums + i)) * load(ups + i)",
        "silu8(load(sums + i)) * load(sums + i)",
    ),
    (
        "layers.0.mlp.topk_ids",
        "moe_bfloat16",
        "logits[e] > logits[best]",
        "logits[e] < logits[best]",
    ),
    ("layers.0.mlp.topk_weights", "moe_bfloat16", "weights[j] /= taken", "weights[j] *= taken"),
    (
        "layers.0.out",
        "moe_bfloat16",
        "out[i] += weight * result[i]",
        "out[i] -= weight * result[i]",
    ),
]


@pytest.fixture
def plant_in_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    text = library.source()

    def planted(old: str, new: str) -> None:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        monkeypatch.setattr(library, "source", lambda: text.replace(old, new))
        forget()

    def forget() -> None:
        library.library.cache_clear()
        kernels._library_or_reason.cache_clear()

    yield planted
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(("step", "name", "old", "new"), C_FAULTS, ids=[f[0] for f in C_FAULTS])
def test_a_fault_in_the_cpus_own_kernels_is_named(
    plant_in_c: Any, step: str, name: str, old: str, new: str
) -> None:
    plant_in_c(old, new)
    report = check(str(GOLDEN / name), devices.choose("CPU"), tokens=40)
    assert report.first_wrong is not None and report.first_wrong.name == step


@pytest.mark.parametrize(
    ("step", "old", "new"),
    [
        ("k_rope", "__builtin_rintf(x[i] / *scale)", "__builtin_rintf(x[i] / *scale * 0.9f)"),
        ("mix", "scores[g * SOME_KEYS + j] *= scale[j]", "scores[g * SOME_KEYS + j] *= scale[0]"),
        ("mix", "eight(I8, p + i) * scale", "eight(I8, p + i) * scale * 1.1f"),
    ],
    ids=["written", "one position", "many"],
)
def test_a_fault_of_int8_in_the_cpus_own_kernels_is_named(
    plant_in_c: Any, step: str, old: str, new: str
) -> None:
    plant_in_c(old, new)
    policy = devices.choose("CPU", kv_dtype="int8")
    wrong = check(str(GOLDEN / "untied_bfloat16"), policy, tokens=40).first_wrong
    assert wrong is not None and wrong.name == f"layers.0.self_attn.{step}"


def test_the_command_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(GOLDEN / "tied_float32"), "--device", "CPU", "--tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert "verdict: CPU computes this model right" in out
    assert "self_attn.q_rope" in out and "fast kernels" in out
    assert "4 of 4: lm_head right" in err and "s left" in err


def test_the_command_says_what_is_wrong_and_what_to_do(
    plant_in_c: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_in_c("silu8(load(sums + i)) * load(ups + i)", "silu8(load(sums + i)) * load(sums + i)")
    assert main(["check", str(GOLDEN / "tied_float32"), "--tokens", "9", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["right"] and report["first_wrong"]["name"] == "layers.0.mlp.act"
    assert main(["check", str(GOLDEN / "tied_float32"), "--tokens", "9"]) == 1
    out = capsys.readouterr().out
    assert "WRONG on CPU: layers.0.mlp.act at position" in out
    assert "what to do: run with --kernels generic" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1"], "--tokens must be from 2 to"),
        (["--tokens", "0"], "--tokens must be from 2 to"),
        (["--tokens", "99999999"], "--tokens must be from 2 to"),
        (["--device", "nonsense"], "unknown device"),
        (["/no/such/model"], "no/such/model"),
    ],
)
def test_what_cannot_be_checked_ends_with_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if options[0].startswith("/") else [str(GOLDEN / "tied_float32")]
    assert main(["check", *model, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
