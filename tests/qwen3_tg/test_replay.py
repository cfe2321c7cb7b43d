"""A recorded generation, gone through again: the same, near ties, and what really differs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN

import qwen3_tg
from qwen3_tg import LLM, CheckpointError, Constraint, Sampling, UsageError
from qwen3_tg.checkpoint import fingerprint, open_checkpoint
from qwen3_tg.cli import main
from qwen3_tg.replay import Recording, replay

SUM = [{"role": "user", "content": "What is 37 + 85?"}]
WARM = Sampling(temperature=1.5, seed=4, repetition_penalty=1.1, logit_bias={5: -1.0, 7: -np.inf})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return qwen3_tg.load("tiny")


@pytest.fixture(scope="module")
def exact() -> LLM:
    return qwen3_tg.load("tiny", kernels="exact")


def recorded(llm: LLM, sampling: Sampling = WARM, **how: Any) -> Recording:
    recording = Recording.of(llm, "tiny", sampling)
    list(llm.chat(SUM, sampling=sampling, on_step=recording, **how))
    return recording


@pytest.mark.parametrize("sampling", [WARM, Sampling()], ids=["warm", "greedy"])
def test_a_replay_in_other_types_finds_the_same_tokens(
    llm: LLM, exact: LLM, sampling: Sampling
) -> None:
    recording = recorded(llm, sampling, max_new_tokens=20)
    found = replay(exact, recording)
    assert found.first_real is None
    assert found.tokens == len(recording.new) > 20
    assert 0 < found.apart < found.rounding / 4  # there is room
    # what the cache holds was computed one by one at first, and many at a time now
    assert replay(llm, recording).apart < found.apart


def test_ids_that_were_put_in_are_recorded_and_not_drawn_again(llm: LLM, exact: LLM) -> None:
    recording = recorded(llm, Sampling(), thinking_budget=3)
    inserted = [n for n in range(len(recording.new)) if n not in recording.logits]
    assert inserted[0] == 1 + 3  # after the tag and three of thinking
    assert inserted == list(range(4, 4 + len(inserted))) and len(inserted) > 10
    assert replay(exact, recording).differences == ()
    none = recorded(llm, Sampling(), thinking_budget=0)
    assert none.prompt == recording.prompt
    assert 0 in none.logits and 1 not in none.logits


def test_a_recording_is_read_as_it_was_written(llm: LLM, tmp_path: Path) -> None:
    recording = recorded(llm, max_new_tokens=5)
    recording.save(tmp_path / "r.json")
    assert Recording.load(tmp_path / "r.json") == recording
    tokens = json.loads((tmp_path / "r.json").read_text())["tokens"]
    for token in tokens:
        best = [logit for _, logit in token["logits"]]
        assert token["gap"] == best[0] - best[1] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_near_tie_is_told_from_a_real_difference(llm: LLM) -> None:
    recording = recorded(llm, Sampling())
    step = 5
    first, second = list(recording.logits[step])[:2]
    # as if two tokens had been equal there up to rounding, and the other one had been taken
    real = dict(recording.logits[step])
    found = replay(llm, with_step(recording, step, second, real | {second: real[second]}))
    (one, *_) = found.differences
    assert (one.n, one.recorded, one.other, one.apart) == (step, second, first, 0)
    assert one.between == pytest.approx(real[first] - real[second])
    assert not one.is_real
    # as if the other device had computed something else
    wrong = with_step(recording, step, second, real | {second: real[first] + 9})
    found = replay(llm, wrong)
    assert found.first_real is not None and found.first_real.n == step
    assert found.apart_at == step and found.apart > found.rounding


def test_logits_that_really_differ_are_told_where_the_tokens_are_the_same(llm: LLM) -> None:
    recording = recorded(llm, Sampling())
    best, *others = recording.logits[5].items()
    found = replay(llm, with_step(recording, 5, best[0], dict([(best[0], best[1] + 9), *others])))
    assert found.differences == ()
    assert found.first_apart == 5


@pytest.mark.parametrize("guarded", [False, True], ids=["a grammar", "the loop guard"])
def test_what_was_drawn_otherwise_than_the_settings_say_is_not_drawn_again(
    llm: LLM, exact: LLM, guarded: bool
) -> None:
    if guarded:  # a bias makes it repeat itself
        loop = Sampling(logit_bias={22: 30.0})
        recording = Recording.of(llm, "tiny", loop)
        list(llm.generate("7", 300, loop, on_step=recording))
    else:
        recording = recorded(llm, Sampling(), constraint=Constraint.regex("[a-z]{3}"))
    assert recording.bound
    found = replay(exact, recording)
    assert (found.differences, found.first_apart) == ((), None)


def with_step(recording: Recording, n: int, id: int, logits: dict[int, float]) -> Recording:
    new = [*recording.new[:n], id, *recording.new[n + 1 :]]
    return replace(recording, new=new, logits=recording.logits | {n: logits})


def test_another_model_is_refused(llm: LLM) -> None:
    other = qwen3_tg.load(str(GOLDEN / "untied_bfloat16"))
    with pytest.raises(CheckpointError, match="another model: tiny, fingerprint"):
        replay(other, recorded(llm, max_new_tokens=1))


def test_the_fingerprint_is_of_weights_and_config_and_not_of_the_place(tmp_path: Path) -> None:
    names = ["untied_bfloat16", "tied_float32", "moe_bfloat16"]
    found = [fingerprint(open_checkpoint(str(GOLDEN / name))) for name in names]
    assert len(set(found)) == 3
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in (GOLDEN / names[0]).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(open_checkpoint(str(copy))) == found[0]
    (file,) = copy.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = fingerprint(open_checkpoint(str(copy)))
    assert changed != found[0]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert fingerprint(open_checkpoint(str(copy))) not in (changed, found[0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a recording"),
        ('{"format": "qwen3_tg generation", "version": 2}', "version 2"),
        ('{"format": "qwen3_tg generation", "version": 1}', "without tokens"),
        ('{"format": "qwen3_tg generation", "version": 1, "tokens": [1]}', "damaged: KeyError"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=says):
        Recording.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["tokens"][2].update(id=-3), "-3 is no token id"),
        (lambda raw: raw["tokens"][2].update(id=99_999), "token id 99999, and the model only 800"),
        (lambda raw: raw["prompt"].append(800), "token id 800, and the model only 800"),
        (lambda raw: raw["tokens"][1]["logits"].append([801, 0.0]), "token id 801"),
        (lambda raw: raw["tokens"][1].update(logits=[[5, math.nan]]), "logits that are no numbers"),
        (lambda raw: raw["tokens"][1].update(logits=[]), "drawn without logits"),
        (lambda raw: [token.pop("logits") for token in raw["tokens"]], "drawn without logits"),
        (lambda raw: raw.update(prompt=[]), "no prompt"),
        (lambda raw: raw.update(context=math.inf), "OverflowError"),
        (lambda raw: raw.update(context=10), "do not fit in the context of 10"),
        (lambda raw: raw.update(model="/no/such/model"), "no such directory"),
        (lambda raw: raw.update(fingerprint="x"), "the recording is of another model"),
    ],
)
def test_what_cannot_be_compared_is_neither_right_nor_wrong(
    llm: LLM,
    change: Callable[[dict[str, Any]], object],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "r.json"
    recorded(llm, max_new_tokens=4).save(file)
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    assert main(["replay", str(file)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and says in line


def test_tokens_that_were_put_in_are_not_counted_as_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    file = str(tmp_path / "r.json")
    assert main(["--record", file, "--thinking-budget", "3", "What is 37 + 85?"]) == 0
    raw = json.loads(Path(file).read_text())
    drawn = sum("logits" in token for token in raw["tokens"])
    assert main(["replay", file]) == 0
    out = capsys.readouterr().out
    assert f"tokens    {drawn}: {drawn} the same" in out
    assert f"inserted  {len(raw['tokens']) - drawn} tokens" in out


def test_no_other_file_is_written_over_by_a_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    file = tmp_path / "x.py"
    file.write_text("print()")
    assert main(["--record", str(file), "What is 37 + 85?"]) == 2
    assert f"--record: {file} is no recording; name another file" in capsys.readouterr().err
    assert file.read_text() == "print()"
    file.write_text("")
    for _ in range(2):
        assert main(["--record", str(file), "What is 37 + 85?"]) == 0
    assert Recording.load(file).new


def test_the_commands_record_and_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    file = str(tmp_path / "r.json")
    assert main(["--record", file, "What is 37 + 85?"]) == 0
    assert capsys.readouterr().out == "122\n"
    assert main(["replay", file, "--kernels", "exact"]) == 0
    out = capsys.readouterr().out
    assert "recorded  CPU, fast kernels, float32, cache float16" in out
    assert "replayed  CPU, exact kernels, float32, cache float32" in out
    assert out.endswith("verdict   the same\n")
    assert main(["replay", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []
    raw = json.loads(Path(file).read_text())
    raw["tokens"][3]["logits"][0][1] += 50
    raw["tokens"][3]["id"] = 9
    raw["tokens"][3]["logits"].append([9, 1.0])
    Path(file).write_text(json.dumps(raw))
    assert main(["replay", file]) == 1
    assert "DIFFERENT: logits really differ from token 3 on" in capsys.readouterr().out
    for wrong in (["--n", "2"], ["--record", str(tmp_path / "no" / "r.json")]):
        assert main(["--record", file, *wrong, "hello"]) == 2
