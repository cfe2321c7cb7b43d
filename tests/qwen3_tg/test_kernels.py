"""`qwen3 kernels`: what it shows is what generation runs, and every step has its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tinygrad.codegen import to_program_cache

import qwen3_tg
from qwen3_tg import device
from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli.main import main
from qwen3_tg.errors import UsageError
from qwen3_tg.kernels.compilers import CompileProblem, TargetCompiler, compiler_for
from qwen3_tg.kernels.cpu import measured
from qwen3_tg.kernels.lower import Kernel, lowered
from qwen3_tg.kernels.report import Column, html
from qwen3_tg.kernels.targets import TARGETS, find_target, policy_for, renderer_of
from qwen3_tg.plan import stored_as

TINY = open_checkpoint("tiny")
STEPS = """embed_tokens input_layernorm q_proj k_proj v_proj q_norm k_norm rope k_cache v_cache
scores probs mix o_proj post_attention_layernorm gate_proj up_proj down_proj norm lm_head gate
topk_ids topk_weights experts""".split()


@pytest.fixture(scope="module")
def here() -> list[Kernel]:
    policy = device.choose("CPU", kernels="generic")
    return list(lowered(TINY.config, TINY.weights, 1, policy))


def names(kernel: Kernel) -> list[str]:
    """Steps that a kernel does."""
    return kernel.step.rpartition(".")[2].split(" + ")


def test_the_kernels_shown_are_those_that_generation_compiles(here: list[Kernel]) -> None:
    llm = qwen3_tg.load("tiny", "CPU", kernels="generic")
    to_program_cache.clear()
    list(llm.generate_ids([1, 2, 3], max_new_tokens=2, stop_ids=()))
    compiled = {_text(program.src[2].arg) for program in to_program_cache.values()}
    # the embedding's kernel and the norm's have parts of others there
    layer = [kernel for kernel in here if ".1." in kernel.step]
    missing = [kernel.step for kernel in layer if _text(kernel.source) not in compiled]
    assert len(layer) > 20 and missing == []


def _text(source: str) -> str:
    return re.sub(r"\s+", " ", source)


def test_each_product_is_found_under_its_name_and_counts_its_bytes(here: list[Kernel]) -> None:
    for phase, S in (("prompt", 32), ("decode", 1)):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            (one,) = [k for k in here if k.phase == phase and name.partition(".")[2] in names(k)]
            weight = TINY.weights[f"model.layers.1.{name}.weight"]
            assert one.nbytes >= weight.nbytes, (phase, name)
            assert one.flop >= 2 * S * weight.shape[0] * weight.shape[1]
        done = {name for kernel in here if kernel.phase == phase for name in names(kernel)}
        without = {"gate", "topk_ids", "topk_weights", "experts"}
        assert done == set(STEPS) - without, "every step has a kernel, and no other has"
    assert all(kernel.seconds and kernel.seconds > 0 for kernel in here)


def test_a_mixture_has_its_router_and_experts_under_their_names() -> None:
    path = Path(__file__).parent.parent / "golden" / "moe_mixed_float32"
    found = open_checkpoint(str(path))
    layers = range(found.config.num_hidden_layers)
    layer = next(n for n in layers if found.config.is_mixture(n))
    target = find_target("CUDA:sm_90")
    how = policy_for(target), renderer_of(target)
    made = list(lowered(found.config, found.weights, layer, *how))
    done = {name for kernel in made for name in names(kernel)}
    assert {"gate", "topk_ids", "gate_proj", "up_proj", "down_proj"} <= done <= set(STEPS)


@pytest.mark.parametrize("kernels", ["fast", "exact"])
def test_the_cpus_own_steps_have_their_functions_and_their_operations(kernels: str) -> None:
    policy = replace(device.choose("CPU", kernels=kernels), prefill_chunk=32)
    made = list(measured(TINY.config, TINY.weights, 0, policy))
    by_label = {(kernel.phase, kernel.step): kernel for kernel in made}
    D, F = TINY.config.hidden_size, TINY.config.intermediate_size
    gate = by_label["prompt", "layers.0.mlp.gate_proj + up_proj + act"]
    assert gate.flop == 2 * 32 * 2 * D * F and gate.nbytes == 2 * 2 * D * F
    assert "static void linear(const Task *t)" in gate.source
    attend = by_label["decode", "layers.0.self_attn.scores + probs + mix"]
    H, Hd = TINY.config.num_attention_heads, TINY.config.head_dim
    assert attend.flop == 4 * H * Hd * 513
    assert all(kernel.seconds and kernel.seconds > 0 for kernel in made)


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("name", ["CUDA:sm_90", "METAL:Apple7", "WGSL", "QCOM", "OPENCL"])
def test_an_absent_target_is_lowered_in_its_language(name: str, kv: str | None) -> None:
    target = find_target(name.lower())
    words = {
        "CUDA C": "__global__",
        "Metal": "kernel void",
        "WGSL": "@compute",
        "OpenCL C": "__kernel",
    }
    stored = stored_as(TINY.config, "q8_0") | {}
    policy = policy_for(target, kv_dtype=kv)
    made = list(lowered(TINY.config, stored, 0, policy, renderer_of(target)))
    assert {"k_cache", "v_cache", "scores", "mix"} <= {n for kernel in made for n in names(kernel)}
    assert len(made) > 30 and all(words[target.language] in kernel.source for kernel in made)
    assert all(kernel.seconds is None for kernel in made)
    bfloat = any("bfloat" in kernel.source or "bf16" in kernel.source for kernel in made)
    assert bfloat == ("bfloat16" in policy.native), "no type that the target lacks"
    if "float16" not in policy.native:
        assert not any(re.search(r"\bhalf\b|\bf16\b", kernel.source) for kernel in made)


def test_what_passes_for_metal_is_checked_and_faults_are_found() -> None:
    found = compiler_for(TARGETS["METAL:Apple7"])
    assert isinstance(found, TargetCompiler) and not found.compiles
    text = (
        "#include <metal_stdlib>\nusing namespace metal;\nkernel void a(device float* data0, "
        "uint3 gid [[threadgroup_position_in_grid]], uint3 lid [[thread_position_in_threadgroup]])"
        " {\n  *(data0+gid.x) = exp2(1.0f);\n}"
    )
    found.run(text)
    for fault in ("exp3(1.0f)", '"text"', "1.0f"):
        broken = text.replace("exp2(1.0f);", f"{fault}" + ("" if fault == "1.0f" else ";"))
        with pytest.raises(CompileProblem):
            found.run(broken)


def test_the_page_has_every_source_beside_the_other_targets(here: list[Kernel]) -> None:
    target = find_target("METAL:Apple7")
    metal = list(lowered(TINY.config, TINY.weights, 1, policy_for(target), renderer_of(target)))
    columns = [
        Column("CPU", "Clang", "float32", here, "ran here"),
        Column("METAL", "Metal", "bfloat16", metal, "lowered", {3: "error: <what> & why"}),
    ]
    page = html("tiny <layer> 1", columns, 1e9)
    assert "<title>tiny &lt;layer&gt; 1</title>" in page and "error: &lt;what&gt; &amp; why" in page
    sources = [unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, re.S)]
    assert sorted(sources) == sorted(k.source for column in columns for k in column.kernels)


def test_the_command_prints_a_table_sources_and_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["kernels", "tiny", "--kernels", "fast", "--layer", "2"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "layer 2 of 5" in out and "a copy of memory" in out and "layers.2.mlp" in out
    assert main([*options, "--source"]) == 0
    assert "static void attend(const Task *t)" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["kernels", "--target", "qcom,WGSL", "--json", "--html", str(page)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [target["name"] for target in found["targets"]] == ["QCOM", "WGSL"]
    assert all(target["outcome"].startswith("lowered") for target in found["targets"])
    assert "QCOM: OpenCL C" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "5"], "--layer must be from 0 to 4, found 5"),
        (["--target", "CUDA:sm_1"], "unknown target 'CUDA:sm_1'; known: CUDA:sm_80,"),
        (["--target", "QCOM", "--device", "CPU"], "--target is for a device that is not here"),
        (["--target", "QCOM", "--dtype", "bfloat16"], "QCOM does not compute in bfloat16"),
        (["--quant", "q9"], "unknown quantisation 'q9'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        find_target("gpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", ""], "--target names no target"),
        (["--target", "WGSL", "--device", "CPU"], "leave away --device"),
        (["--target", "WGSL", "--html", "/nowhere/page.html"], "--html: /nowhere is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err
