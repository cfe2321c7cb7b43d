"""`qwen3 plan`: what it says against what is really allocated, for every format."""

from __future__ import annotations

import gc
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from format_writers import (
    BLOCK_TYPES,
    Weights,
    gguf_parts,
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)
from hub_server import Hub, serve, use
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import Ops

import qwen3_tg
from qwen3_tg import device as devices
from qwen3_tg import usage
from qwen3_tg.checkpoint import Checkpoint, open_checkpoint
from qwen3_tg.checkpoint.gguf_header import TYPES
from qwen3_tg.cli import main
from qwen3_tg.cli import plan as command
from qwen3_tg.cli.sizes import read_size
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError, UsageError
from qwen3_tg.kv_sizes import cache_bytes, last_growth
from qwen3_tg.llm import LLM
from qwen3_tg.plan import (
    CONFIGS,
    FORMS,
    ModelSize,
    Source,
    Use,
    find_released,
    find_source,
    largest_context,
    make_plan,
    scratch_bytes,
    stored_as,
)
from qwen3_tg.plan import scratch as scratch_file

ROOT = Path(__file__).parent.parent.parent
SMALL = {"num_hidden_layers": 1}
Write = Callable[..., Weights]
# What is written -> how; a file's name ends in .gguf.
WRITERS: dict[str, Write] = {
    "float32": partial(write_float, dtype="float32"),
    "float16": partial(write_float, dtype="float16"),
    "bfloat16 shards": partial(write_float, dtype="bfloat16", shards=3),
    "AWQ": write_awq,
    "GPTQ 4-bit": write_gptq,
    "GPTQ 8-bit": partial(write_gptq, bits=8),
    "GPTQ act order": partial(write_gptq, act_order=True),
    "FP8": write_fp8,
    "MLX 4-bit": write_mlx,
    "MLX 8-bit": partial(write_mlx, bits=8, group_size=32),
    **{f"GGUF {type}": partial(write_gguf, type_of=type) for type in TYPES if type in BLOCK_TYPES},
    "GGUF F16": partial(write_gguf, type_of="F16"),
    "GGUF BF16 parts": partial(write_gguf, type_of="BF16", split=3),
}


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """Models of earlier tests are freed now and not while this one counts."""
    gc.collect()


def written(name: str, moe: bool, folder: Path, **sizes: Any) -> Path:
    config, weights = random_model(moe, seed=5, **(SMALL | sizes))
    path = folder / "model.gguf" if name.startswith("GGUF") else folder
    WRITERS[name](path, config, weights)
    return gguf_parts(path)[0] if name.startswith("GGUF") else path


def size_of(model: Source | Checkpoint) -> ModelSize:
    return ModelSize.of(model.config, model.weights)


def buffer_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all buffers that these tensors are made of, each once."""
    buffers = {
        uop for t in tensors for uop in t.uop.toposort() if uop.op is Ops.BUFFER and uop.is_realized
    }
    return sum(int(uop.nbytes()) for uop in buffers)


def weights_bytes(llm: LLM) -> int:
    model = llm._engine.forward.model
    tensors = get_state_dict(model).values()
    table = model.rope.uop.base
    return buffer_bytes(t for t in tensors if t.uop.base is not table)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU of 8 GiB is the only device; what is noted."""
    policy = devices.choose("CPU", kernels="generic")
    monkeypatch.setattr(
        devices, "working_policies", lambda kv: [replace(policy, kv_dtype=kv or policy.kv_dtype)]
    )
    monkeypatch.setattr(devices, "free_memory", lambda name: 8 * 2**30)
    monkeypatch.setattr(command, "load_factor", lambda name: 1.0)
    notes: list[str] = []
    monkeypatch.setattr(command.terminal, "note", notes.append)
    return notes


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", WRITERS)
def test_weights_and_cache_are_planned_to_the_byte(name: str, moe: bool, tmp_path: Path) -> None:
    path = written(name, moe, tmp_path, max_position_embeddings=2100)
    checkpoint = open_checkpoint(str(path))
    policy = devices.choose("CPU", kernels="generic")
    planned = make_plan(ModelSize.of(checkpoint.config, checkpoint.weights), policy, None)
    before = usage.allocated_bytes("CPU")
    llm = qwen3_tg.load(str(path), kernels="generic")
    table = 16 * 4 if "IQ4" in name else 0  # made once, for all weights of IQ4_NL and IQ4_XS
    loaded = usage.allocated_bytes("CPU") - before
    exact = planned.weights_bytes + planned.rope_bytes
    assert exact <= loaded <= exact + table
    assert weights_bytes(llm) == planned.weights_bytes
    cache = llm._engine._cache

    def cache_now() -> int:
        return sum(int(t.nbytes()) for layer in cache.layers for t in layer.tensors)

    assert cache_now() == planned.first_cache_bytes
    cache.grow(cache.limit)
    assert cache.limit == cache.capacity == planned.capacity == 2132
    assert cache_now() == planned.cache_bytes
    assert planned.growing_cache_bytes == planned.cache_bytes + planned.first_cache_bytes
    assert usage.allocated_bytes("CPU") - before - loaded == planned.cache_bytes


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", ["bfloat16 shards", "GGUF Q8_0", "AWQ"])
def test_all_is_planned_to_a_kilobyte_for_fast_kernels(
    name: str, moe: bool, tmp_path: Path
) -> None:
    path = written(name, moe, tmp_path, max_position_embeddings=2100)
    before = usage.allocated_bytes("CPU")
    llm = qwen3_tg.load(str(path))
    assert llm.policy.kernels == "fast" and llm.policy.kv_dtype == "float16"
    assert llm.shared_bytes == usage.plan_of(llm).weights_bytes
    list(llm.generate_ids([3] * 40, max_new_tokens=2, stop_ids=()))
    found, planned = usage.taken_bytes(llm) - before, usage.plan_of(llm).first_bytes
    assert 0 <= found - planned < 4096  # ids, positions, and the like


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_batch_is_planned_to_a_kilobyte_for_fast_kernels(moe: bool, tmp_path: Path) -> None:
    path = written("bfloat16 shards", moe, tmp_path, max_position_embeddings=2100)
    before = usage.allocated_bytes("CPU")
    llm = qwen3_tg.load(str(path))
    list(llm.generate_ids([3] * 40, max_new_tokens=2, stop_ids=()))
    slots = llm.slots(3)
    taken = [slots.start([3, 4, 5])[0] for _ in range(3)]
    slots.step(dict.fromkeys(taken, 6))
    size = ModelSize.of(llm.config, llm.checkpoint.weights)
    planned = make_plan(size, llm.policy, None, use=Use(batch=3))
    assert 0 <= usage.taken_bytes(llm) - before - planned.first_bytes < 4096
    for cache in (llm._engine._cache, *slots._caches):
        cache.grow(cache.limit)
    now = sum(llm._engine.cache_bytes(cache) for cache in (llm._engine._cache, *slots._caches))
    assert now == planned.cache_bytes + planned.batch_cache_bytes
    assert planned.batch_cache_bytes == 3 * cache_bytes(llm.config, 2101, "float16")
    assert planned.needed_bytes > planned.full_bytes + cache_bytes(llm.config, 2048, "float16") - 1


def test_a_draft_model_is_planned_to_a_kilobyte_for_fast_kernels(tmp_path: Path) -> None:
    path = written("bfloat16 shards", False, tmp_path / "model", max_position_embeddings=3000)
    small = written("GGUF Q8_0", False, tmp_path, max_position_embeddings=9000)
    before = usage.allocated_bytes("CPU")
    llm = qwen3_tg.load(str(path), draft=str(small))
    assert llm.draft and llm.draft.context == 3000
    generation = llm.generate_ids([3] * 40, max_new_tokens=30, stop_ids=())
    list(generation)
    assert generation.speculation and generation.speculation.guessed
    size, draft = (ModelSize.of(m.config, m.checkpoint.weights) for m in (llm, llm.draft))
    planned = make_plan(size, llm.policy, None, use=Use(draft=draft))
    assert 0 <= usage.taken_bytes(llm) - before - planned.first_bytes < 8192
    for cache in (llm._engine._cache, llm.draft._engine._cache):
        cache.grow(cache.limit)
    assert planned.draft and llm.draft.cache_capacity == planned.draft.capacity


def test_a_draft_made_for_less_than_the_context_keeps_to_that() -> None:
    config = CONFIGS["Qwen3-0.6B"]
    size = ModelSize.of(config, stored_as(config, "bf16"))
    planned = make_plan(size, devices.imagined(), 100_000, use=Use(draft=size))
    assert planned.draft and planned.draft.context == 40_960


def test_all_parts_together_are_what_is_allocated_after_a_reply(tmp_path: Path) -> None:
    before = usage.allocated_bytes("CPU")
    llm = qwen3_tg.load("tiny", kv_dtype="float32", kernels="generic")
    list(llm.generate_ids([3] * 40, max_new_tokens=2, stop_ids=()))
    planned = usage.plan_of(llm)
    exact = planned.first_bytes - planned.first_scratch_bytes
    found = usage.allocated_bytes("CPU") - before - exact
    assert 0.8 < planned.first_scratch_bytes / found < 1.25


@pytest.mark.parametrize("packed", [False, True])
def test_scratch_is_near_what_the_graphs_hold(packed: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "max_position_embeddings": 1000}
    path = written("MLX 4-bit" if packed else "bfloat16 shards", False, tmp_path, **sizes)
    llm = qwen3_tg.load(str(path), kernels="generic")
    before = usage.allocated_bytes("CPU")
    list(llm.generate_ids([3] * 40, max_new_tokens=2, stop_ids=()))
    size = ModelSize.of(llm.config, llm.checkpoint.weights)
    found = usage.allocated_bytes("CPU") - before
    found -= make_plan(size, llm.policy, None).first_cache_bytes
    assert size.is_packed is packed
    assert 0.7 < scratch_bytes(size, llm.policy, llm.cache_capacity) / found < 1.3


def released_configs() -> Iterator[tuple[str, dict[str, Any], int]]:
    raw = json.loads((ROOT / "tests" / "data" / "qwen3_configs.json").read_text())
    for name, config in raw.items():
        count = config.pop("_meta")["parameter_count_from_config"]
        del config["generation_config"]
        yield name, config, count


@pytest.mark.parametrize(("name", "raw", "count"), list(released_configs()))
def test_built_in_shapes_are_those_of_the_released_configs(
    name: str, raw: dict[str, Any], count: int
) -> None:
    assert CONFIGS[name] == ModelConfig.from_dict(raw)
    size = ModelSize.of(CONFIGS[name], stored_as(CONFIGS[name], "bf16"))
    assert size.weights_bytes == 2 * count


@pytest.mark.parametrize(
    ("name", "nbytes"), [("Qwen3-32B", 65_524_246_528), ("Qwen3-30B-A3B", 61_064_245_248)]
)
def test_released_sizes(name: str, nbytes: int) -> None:
    source = find_source(name, False, pytest.fail)
    assert ModelSize.of(source.config, source.weights).weights_bytes == nbytes
    assert source.is_open and source.form == "bf16"


HYPOTHETICAL = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16 shards",
    "awq": "AWQ",
    "gptq-int4": "GPTQ 4-bit",
    "gptq-int8": "GPTQ 8-bit",
    "fp8": "FP8",
    "mlx-4bit": "MLX 4-bit",
}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("form", HYPOTHETICAL)
def test_a_form_that_is_only_asked_for_is_as_large_as_the_real_file(
    form: str, moe: bool, tmp_path: Path
) -> None:
    name = HYPOTHETICAL[form]
    if form == "mlx-4bit" and moe:  # mlx-lm keeps routers in 8 bits
        routers = {f"model.layers.{i}.mlp.gate": {"bits": 8, "group_size": 64} for i in (0,)}
        config, weights = random_model(moe, seed=5, **SMALL)
        write_mlx(tmp_path, config, weights, overrides=routers)
    else:
        written(name, moe, tmp_path)
    real = open_checkpoint(str(tmp_path))
    made = stored_as(real.config, form)
    assert {n: (w.shape, w.device_bytes) for n, w in made.items()} == {
        n: (w.shape, w.device_bytes) for n, w in real.weights.items()
    }


GGUF_FORMS = [form for form in FORMS if re.match(r"i?q\d", form) and form != "iq4_xs"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", GGUF_FORMS)
def test_a_gguf_form_is_as_large_as_what_quantize_writes(
    form: str, tied: bool, tmp_path: Path
) -> None:
    config, weights = random_model(False, tied, seed=5, num_hidden_layers=2)
    write_float(tmp_path / "float", config, weights)
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(tmp_path / "float"), str(out), "--type", form]) == 0
    real = open_checkpoint(str(out))
    made = stored_as(real.config, form)
    assert {n: (w.format, w.device_bytes) for n, w in made.items()} == {
        n: (w.format, w.device_bytes) for n, w in real.weights.items()
    }


@pytest.mark.parametrize(
    ("typed", "name", "form"),
    [
        ("Qwen3-32B", "Qwen3-32B", None),
        ("qwen3-32b", "Qwen3-32B", None),
        ("Qwen/Qwen3-32B-AWQ", "Qwen3-32B", "awq"),
        ("Qwen3-8B-GGUF", "Qwen3-8B", None),
        ("Qwen/Qwen3-8B-GGUF:Q4_K_M", "Qwen3-8B", "q4_k_m"),
        ("Qwen3-8B-Q8_0.gguf", "Qwen3-8B", "q8_0"),
        ("Qwen3-30B-A3B-GPTQ-Int4", "Qwen3-30B-A3B", "gptq-int4"),
        ("Qwen3-8B-MLX-4bit", "Qwen3-8B", "mlx-4bit"),
        ("Qwen3-4B-Instruct-2507-FP8", "Qwen3-4B-Instruct-2507", "fp8"),
        ("Qwen3-14B-Base", "Qwen3-14B-Base", None),
    ],
)
def test_names_of_released_models(typed: str, name: str, form: str | None) -> None:
    found = find_released(typed)
    assert found and (found.name, found.form) == (name, form)


@pytest.mark.parametrize(
    "typed", ["Qwen3-7B", "Qwen3-8Bx", "Qwen3-8B-mine", "Qwen2-7B", "x/Qwen3-8B"]
)
def test_other_names_are_none_of_them(typed: str) -> None:
    assert find_released(typed) is None


SMALLEST = ModelSize.of(CONFIGS["Qwen3-0.6B"], stored_as(CONFIGS["Qwen3-0.6B"], "bf16"))
USES = {"alone": Use(), "batch": Use(batch=4), "draft": Use(draft=SMALLEST)}
in_every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


@in_every_use
@pytest.mark.parametrize("memory_gib", [8, 17.7, 24, 62, 100, 1000])
@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-4B-Instruct-2507"])
def test_the_largest_context_fits_and_one_more_token_does_not(
    name: str, memory_gib: float, use: Use
) -> None:
    config, memory = CONFIGS[name], int(memory_gib * 2**30)
    size, policy = ModelSize.of(config, stored_as(config, "q8_0")), devices.imagined(memory)
    found = largest_context(size, policy, memory, use=use)
    if found:
        assert make_plan(size, policy, found, use=use).needed_bytes <= memory
    if found < config.longest_context:
        assert make_plan(size, policy, found + 1, use=use).needed_bytes > memory


@in_every_use
def test_needed_bytes_never_fall_with_the_context(use: Use) -> None:
    policy = devices.choose("CPU")
    contexts = [n + d for n in range(1000, 50_000, 1024) for d in (-17, -16, -15, 0, 1)]
    needed = [make_plan(SMALLEST, policy, n, use=use).needed_bytes for n in sorted(contexts)]
    assert needed == sorted(needed)


def test_the_old_and_the_new_cache_are_at_most_five_thirds_of_the_full_one() -> None:
    for limit in range(2049, 200_000, 37):
        before, after = last_growth(limit) or (0, limit)
        assert after == limit and before + after <= 5 / 3 * limit + 2048


def test_longer_contexts_than_the_model_takes_are_refused() -> None:
    size = ModelSize.of(CONFIGS["Qwen3-8B"], stored_as(CONFIGS["Qwen3-8B"], "awq"))
    with pytest.raises(UsageError, match="context must be from 1 to 131072"):
        make_plan(size, devices.imagined(), 131073)


def test_half_the_bytes_of_keys_and_values_take_half_the_cache() -> None:
    size = ModelSize.of(CONFIGS["Qwen3-8B"], stored_as(CONFIGS["Qwen3-8B"], "awq"))
    wide, narrow = (
        make_plan(size, devices.imagined(kv_dtype=kv), 5000) for kv in ("float32", "float16")
    )
    assert wide.cache_bytes == 2 * narrow.cache_bytes
    assert wide.cache_bytes == cache_bytes(size.config, 5000 + 256, "float32")


def test_int8_takes_a_byte_for_a_number_and_four_for_the_scale_of_a_head() -> None:
    config = CONFIGS["Qwen3-8B"]
    assert config.head_dim == 128
    assert cache_bytes(config, 1000, "int8") * 64 == cache_bytes(config, 1000, "float16") * 33


class TestWhereItIsFound:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
        with serve() as hub:
            use(hub, tmp_path / "cache", monkeypatch)
            yield hub

    def test_headers_on_the_hub_say_the_same_as_the_files(self, hub: Hub) -> None:
        hub.add("someone/model", GOLDEN / "sharded_bfloat16")
        notes: list[str] = []
        source = find_source("someone/model", False, notes.append)
        real = open_checkpoint(str(GOLDEN / "sharded_bfloat16"))
        assert source.config == real.config and source.where == "the hub"
        assert {n: w.device_bytes for n, w in source.weights.items()} == {
            n: w.device_bytes for n, w in real.weights.items()
        }
        assert notes == ["reading the headers of someone/model on the hub"]
        read = [file for file, _ in hub.log]
        assert "tokenizer.json" not in read

    @pytest.mark.parametrize("name", ["AWQ", "GPTQ 4-bit", "FP8", "MLX 4-bit"])
    def test_packed_ones_too(self, name: str, hub: Hub, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        written(name, True, folder)
        hub.add("someone/model", folder)
        source = find_source("someone/model", False, lambda text: None)
        real = open_checkpoint(str(folder))
        assert ModelSize.of(source.config, source.weights) == ModelSize.of(
            real.config, real.weights
        )

    def test_one_of_several_gguf_files_in_parts(self, hub: Hub, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        config, weights = random_model(seed=5, **SMALL)
        write_gguf(folder / "m-Q8_0.gguf", config, weights, "Q8_0", split=2)
        write_gguf(folder / "m-Q4_K_M.gguf", config, weights, "Q4_K")
        hub.add("someone/model-GGUF", folder)
        with pytest.raises(
            CheckpointError, match=r"several models; say which: .*:Q4_K_M or .*Q8_0"
        ):
            find_source("someone/model-GGUF", False, lambda text: None)
        source = find_source("someone/model-GGUF:q8_0", False, lambda text: None)
        real = open_checkpoint(str(folder / "m-Q8_0-00001-of-00002.gguf"))
        assert ModelSize.of(source.config, source.weights) == ModelSize.of(
            real.config, real.weights
        )

    def test_a_released_model_is_known_offline_and_another_is_not(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        source = find_source("Qwen/Qwen3-32B", False, lambda text: None)
        assert source.where.startswith("the built-in table")
        (note,) = source.notes
        assert "is this machine online" in note and "built-in table instead" in note
        with pytest.raises(CheckpointError, match="is this machine online"):
            find_source("someone/Qwen3-32B", False, lambda text: None)
        with pytest.raises(CheckpointError, match="no such directory"):
            find_source("./nothing/here", False, pytest.fail)

    def test_a_bare_name_asks_nobody(self, hub: Hub) -> None:
        find_source("Qwen3-32B", False, pytest.fail)
        find_source("Qwen/Qwen3-32B", True, pytest.fail)
        assert hub.log == []


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], line: str) -> str:
        assert main(["plan", *shlex.split(line)]) == 0
        return capsys.readouterr().out

    def test_a_file_is_told_part_by_part(
        self, said: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = self.run(capsys, "tiny --context 1000")
        rows = dict(re.findall(r"^  (\w[\w, ]*?)  +([\d,]+)  ", out, re.MULTILINE))
        numbers = {what: int(nbytes.replace(",", "")) for what, nbytes in rows.items()}
        assert numbers["weights"] == 2_174_336
        assert numbers["cache, full"] == 2 * 5 * 1032 * 2 * 32 * 4
        assert numbers["rope table"] == 1032 * 32 * 4
        assert numbers["all, full"] == numbers["all at first"]
        assert "CPU: fits:" in out and "the largest context is 8,192" in out
        assert "estimate" in out

    def test_a_bare_name_shows_every_form_at_every_context(
        self, said: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = self.run(capsys, "Qwen3-8B")
        assert all(re.search(rf"^{re.escape(form)} ", out, re.MULTILINE) for form in FORMS)
        assert all(f"{n:,}" in out for n in command.CONTEXTS)
        assert "* fits in the 8.0 GiB" in out and "16,381,470,720" in out
        assert max(map(len, out.splitlines())) <= 100

    def test_which_fits_in_24_gb_is_answered_without_the_machine(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = self.run(capsys, "Qwen3-32B --quant all --memory 24GB")
        rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert "*" in rows["q4_k_m"] and "*" not in rows["bf16"]
        assert rows["q4_k_m"].split()[-1].replace(",", "").isdecimal() and rows["bf16"].endswith(
            "-"
        )

    @pytest.mark.parametrize("kv", ["float32", "float16", "bfloat16", "int8"])
    def test_json_has_every_number(self, kv: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = (
            f"Qwen3-8B --quant q4_k_m,awq --context 1024,4096 --memory 16GiB --kv-dtype {kv} --json"
        )
        found = json.loads(self.run(capsys, line))
        (on,) = found["devices"]
        assert on["free_bytes"] == 16 * 2**30 and on["kv_dtype"] == kv
        assert [form["format"] for form in on["formats"]] == ["q4_k_m", "awq"]
        one = on["formats"][0]["plans"][1]
        assert one["context"] == 4096 and one["fits"] is True
        assert one["full_bytes"] == sum(
            one[f"{part}_bytes"] for part in ("weights", "cache", "rope", "logits", "scratch")
        )

    def test_of_a_batch_and_of_a_draft_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        alone = "Qwen3-8B --quant q8_0 --context 4096 --memory 48GB"
        plain = self.run(capsys, alone)
        assert "draft" not in plain and "batch" not in plain
        out = self.run(capsys, f"{alone} --batch 8")
        assert re.search(r"^  batch, full +[\d,]+ +4\.5 GiB  8 more caches$", out, re.MULTILINE)
        out = self.run(capsys, f"{alone} --draft Qwen3-0.6B-GGUF:Q8_0")
        assert re.search(r"^  draft, full +[\d,]+ .* 4,096 tokens$", out, re.MULTILINE)
        (on,) = json.loads(self.run(capsys, f"{alone} --json --draft Qwen3-0.6B"))["devices"]
        (one,) = on["formats"][0]["plans"]
        parts = ("weights", "cache", "rope", "logits", "scratch", "draft_full")
        assert one["full_bytes"] == sum(one[f"{part}_bytes"] for part in parts)
        assert "8 prompts at once" in self.run(capsys, "Qwen3-8B --memory 48GB --batch 8")
        assert "with a draft model" in self.run(capsys, "Qwen3-8B --memory 48GB --draft Qwen3-0.6B")

    def test_a_narrow_terminal_gets_the_table_in_parts(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command, "_columns", lambda: 40)
        out = self.run(capsys, "Qwen3-8B --quant all --memory 24GB")
        assert max(map(len, out.splitlines())) <= 40
        assert len(re.findall(r"^q4_k_m ", out, re.MULTILINE)) > 1
        assert all(f"{n:,}" in out for n in command.CONTEXTS)

    def test_a_device_that_does_not_tell_its_memory(
        self,
        said: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(devices, "free_memory", lambda name: None)
        assert "unknown whether it fits" in self.run(capsys, "tiny")
        assert "longest" not in self.run(capsys, "Qwen3-8B")

    @pytest.mark.parametrize(
        ("line", "text", "code"),
        [
            ("", "the following arguments are required: MODEL", 2),
            ("Qwen3-8B --quant q7", "unknown quantisation 'q7'; known: bf16", 2),
            ("Qwen3-8B --quant ,", "--quant names no quantisation", 2),
            ("Qwen3-8B --context 0", "--context must be a number of tokens", 2),
            ("Qwen3-8B --context many", "--context must be a number of tokens", 2),
            ("Qwen3-8B --batch 0", "--batch must be at least 1", 2),
            ("Qwen3-8B --batch 2 --draft Qwen3-0.6B", "one prompt at a time, not for --batch", 2),
            ("Qwen3-8B --draft tiny", "the draft model tiny has a vocabulary of 800 ids", 2),
            ("Qwen3-8B --memory lots", "--memory must be a size such as 24GB", 2),
            ("Qwen3-8B --memory 24", "--memory must be a size such as 24GB", 2),
            ("Qwen3-8B --memory 0", "--memory must be a size such as 24GB", 2),
            ("Qwen3-8B --memory 8GB --context 200000", "context must be from 1 to 131072", 2),
            ("Qwen3-8B --kv-dtype int4", "invalid choice: 'int4'", 2),
            ("/no/such/model", "no such directory", 1),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self, line: str, text: str, code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *line.split()]) == code
        out, err = capsys.readouterr()
        (error,) = err.splitlines()
        assert error.startswith("error: ") and text in error and out == ""

    @pytest.mark.parametrize(
        ("text", "nbytes"),
        [("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), ("1.5T", 15 * 10**11), ("512", 512)],
    )
    def test_sizes(self, text: str, nbytes: int) -> None:
        assert read_size("--memory", text) == nbytes

    def test_the_table_of_the_readme_is_what_the_command_prints(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        block = re.search(r"<!-- plan: start -->\n(.*?)<!-- plan: end -->", text, re.DOTALL)
        assert block
        line = re.search(r"^    qwen3 plan (.*)$", block[1], re.MULTILINE)
        table = re.search(r"^\|.*\|$", block[1], re.MULTILINE | re.DOTALL)
        assert line and table
        assert self.run(capsys, line[1]).strip() == table[0].strip()


class TestScratchIsMeasured:
    def test_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scratch_file, "_path", lambda: tmp_path / "scratch.json")
        found = usage.scratch_factor("CPU")
        assert 0.5 < found < 2
        assert scratch_file.load_factor(devices.choose("CPU", kernels="generic")) == found

    def test_not_at_all_for_kernels_that_take_what_is_planned(self) -> None:
        assert scratch_file.load_factor(devices.choose("CPU")) == 1

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"CPU tinygrad 0.14.0": 1e9}', "\xff"])
    def test_a_file_that_says_nothing_sensible_is_not_believed(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scratch_file, "_path", lambda: tmp_path / "scratch.json")
        (tmp_path / "scratch.json").write_bytes(text.encode("latin-1"))
        policy = devices.choose("CPU", kernels="generic")
        assert scratch_file.load_factor(policy) is None
        scratch_file.save_factor("CPU", 1.25)
        assert scratch_file.load_factor(policy) == 1.25

    def test_devices_without_a_memory_planner_hold_every_layer(self) -> None:
        size = ModelSize.of(CONFIGS["Qwen3-8B"], stored_as(CONFIGS["Qwen3-8B"], "q8_0"))
        policy = devices.imagined()
        shared = scratch_bytes(size, policy, 4096)
        assert scratch_bytes(size, replace(policy, device="CL"), 4096) > 36 * shared


def test_generate_v_prints_planned_against_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    before = usage.allocated_bytes("CPU")
    line = "-v --thinking off --kv-dtype float16 --max-new-tokens 2 x"
    assert main(line.split()) == 0
    err = capsys.readouterr().err
    loaded, used = (line for line in err.splitlines() if line.startswith("memory of CPU"))
    rope_bytes = (2048 + 512) * 32 * 4
    assert f"planned 2,174,336 bytes of weights and {rope_bytes:,} of rope table" in loaded
    taken = int(re.findall(r"taken ([\d,]+)", loaded)[0].replace(",", ""))
    assert taken == before + 2_174_336 + rope_bytes
    assert "cache 2,621,440 for 2,048 positions" in used
    assert "peak in main memory" in used


def test_what_was_found_in_the_checkpoint_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main("--thinking off --context 3000 --max-new-tokens 1 x".split()) == 0
    assert "note: YaRN factor 1.46484, attention scaling" in capsys.readouterr().err


def test_what_is_only_asked_for_takes_no_memory() -> None:
    weight = stored_as(CONFIGS["Qwen3-235B-A22B"], "f32")["lm_head.weight"]
    assert weight.nbytes == 151936 * 4096 * 4
    assert weight.arrays["data"].strides == (0, 0)
