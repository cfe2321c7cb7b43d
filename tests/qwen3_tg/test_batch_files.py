"""`qwen3 generate --input --output`: every line is answered once, whatever breaks off."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import qwen3_tg
from qwen3_tg.cli import main
from qwen3_tg.errors import DeviceError

TINY = Path(qwen3_tg.__file__).parent / "tiny"
SUMS = [(37, 85), (5, 6), (12, 5), (123, 456), (7, 8), (41, 9), (99, 1), (20, 30)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*lines: Any, name: str = "in.jsonl") -> None:
    """Write the input: JSON, or bytes as they are."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    Path(name).write_bytes(b"\n".join(texts) + b"\n")


def sums(count: int = len(SUMS)) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {a} + {b}?"} for a, b in SUMS[:count]]


def run(*options: str) -> int:
    line = ["generate", "--input", "in.jsonl", "--output", "out.jsonl", "--temperature", "0"]
    return main([*line, *options])


def answers(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_bytes().split(b"\n")[:-1]]


def test_each_line_has_its_answer_in_its_place(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(*sums())
    assert run("--batch", "3") == 0
    found = answers()
    assert [answer["text"] for answer in found] == [str(a + b) for a, b in SUMS]
    assert [answer["line"] for answer in found] == list(range(1, len(SUMS) + 1))
    assert found[0] == {
        "line": 1,
        "text": "122",
        "thinking": "37+85\n7+5=12\n3+8+1=12\n122",
        "end": "stop",
        "prompt_tokens": 18,
        "thinking_tokens": 27,
        "answer_tokens": 4,
        "seed": found[0]["seed"],
        "key": found[0]["key"],
    }
    assert len({answer["seed"] for answer in found}) == len({a["key"] for a in found}) == len(SUMS)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("8 answers, ") and "tokens/s" in err


def test_a_line_says_what_it_wants(folder: Path) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    talk = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "What is 5 + 6?"},
    ]
    ask(
        "What is 5 + 6?",
        {"messages": talk, "id": [1, "x"]},
        {"prompt": "What is 5 + 6?", "thinking": "off", "max_new_tokens": 4},
        {"prompt": "What is 5 + 6?", "thinking_budget": 3, "id": None},
        {"prompt": "What is 5 + 6?", "stop": ["1"]},
        {"prompt": "What is 5 + 6?", "temperature": 3, "seed": 5, "max_new_tokens": 3},
        {"prompt": "What is 5 + 6?", "system": "Be brief.", "tools": [tool]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 5 + 6?"}]}]},
    )
    assert run() == 0
    found = answers()
    assert found[0]["text"] == found[1]["text"] == "11" and found[1]["id"] == [1, "x"]
    assert found[1]["prompt_tokens"] > found[0]["prompt_tokens"]
    assert "thinking" not in found[2] and found[2]["end"] == "length"
    assert found[3]["thinking_tokens"] != found[0]["thinking_tokens"] and found[3]["id"] is None
    assert found[4]["end"] == "stop_string" and found[4]["text"] == ""
    assert found[5]["seed"] == 5
    assert found[6]["prompt_tokens"] > found[0]["prompt_tokens"] + 20
    assert found[7]["text"] == "11" and found[7]["prompt_tokens"] == found[0]["prompt_tokens"]


WRONG: list[tuple[Any, str]] = [
    (b"{bad", "not valid JSON: "),
    (b"[" * 100_000, "not valid JSON: "),
    (b"\xff\xfe", "not valid JSON: "),
    ("", "the prompt is empty"),
    ([1], "must be an object or a text, found list"),
    ({"promt": "x"}, "'promt' is unknown; a line may have id, prompt, messages, "),
    ({}, 'must have either "prompt" or "messages"'),
    ({"prompt": "a", "messages": []}, 'must have either "prompt" or "messages"'),
    ({"prompt": 1}, "'prompt' must be a text, found int"),
    ({"prompt": "a", "temperature": "hot"}, "temperature must be a number, at least 0, found"),
    ({"prompt": "a", "top_k": 0.5}, "top_k must be an integer"),
    ({"prompt": "a", "thinking": True}, "thinking must be on or off, found True"),
    ({"prompt": "a", "system": 3}, "'system' must be a text, found int"),
    ({"prompt": "a", "stop": 3}, "'stop' must be a list or a text, found int"),
    ({"prompt": "a", "stop": None}, "'stop' must be a list or a text, found NoneType"),
    ({"prompt": "a", "stop": ""}, "stop strings must be a list of texts, none empty"),
    ({"prompt": "a", "logit_bias": None}, "'logit_bias' must be an object, found NoneType"),
    ({"prompt": "a", "logit_bias": [1]}, "'logit_bias' must be an object, found list"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "'logit_bias' must be by token id, such as"),
    ({"prompt": "a", "logit_bias": {"-1": 1}}, "'logit_bias' must be by token id, such as"),
    ({"prompt": "a", "logit_bias": {"01": 1}}, "'logit_bias' must be by token id, such as"),
    ({"prompt": "a", "logit_bias": {"1": None}}, "'logit_bias' of 1 must be a number, found None"),
    ({"prompt": "a", "logit_bias": {"1": True}}, "'logit_bias' of 1 must be a number, found True"),
    ({"prompt": "a", "logit_bias": {"1": "2"}}, "'logit_bias' of 1 must be a number, found '2'"),
    (b'{"prompt": "a", "logit_bias": {"1": 1e999}}', "logit_bias of 1 must be a number or -inf"),
    ({"prompt": "a", "logit_bias": {"1": 10**400}}, "logit_bias of 1 must be a number or -inf"),
    ({"prompt": "a", "presence_penalty": 10**400}, "presence_penalty must be a number, found"),
    ({"prompt": "a", "stop": [1]}, "stop strings must be a list of texts"),
    ({"prompt": "a", "tools": [1]}, "tools must be a list of JSON schemas"),
    ({"prompt": "a", "tools": 3}, "'tools' must be a list, found int"),
    ({"prompt": "\ud800"}, "a text in it is not valid Unicode"),
    (b'{"prompt": "a", "id": NaN}', "not valid JSON: NaN is no JSON"),
    ({"prompt": "a", "thinking": "off", "thinking_budget": 3}, "a thinking_budget has no meaning"),
    (
        {"messages": [{"role": "system", "content": "a"}], "system": "b"},
        "'system' is also the first of the messages",
    ),
    ({"messages": [{"role": "robot", "content": "a"}]}, "message 0: role must be one of"),
    ({"messages": "a"}, "'messages' must be a list, found str"),
    ({"messages": [3]}, "message 0"),
    ({"prompt": "1" * 3000}, "tokens"),
]


def test_what_is_wrong_with_a_line_is_written_and_the_rest_is_answered(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(*(line for wrong, _ in WRONG for line in (wrong, *sums(1))))
    assert run() == 1
    found = answers()
    assert [answer["line"] for answer in found] == list(range(1, 2 * len(WRONG) + 1))
    for answer, (line, message) in zip(found[::2], WRONG, strict=True):
        assert message in answer["error"], line
        assert set(answer) == {"line", "error", "key"} and "\n" not in answer["error"]
    assert {answer["text"] for answer in found[1::2]} == {"122"}
    err = capfd.readouterr().err
    *_, error = err.splitlines()
    assert error.startswith(f'error: {len(WRONG)} lines of {2 * len(WRONG)} have an "error"')
    assert f"{len(WRONG)} answers and {len(WRONG)} errors, " in err


def test_an_answer_that_is_not_of_the_form_asked_for_is_kept_with_the_error(folder: Path) -> None:
    ask({"prompt": "What is 5 + 6?", "max_new_tokens": 1}, "What is 5 + 6?")
    assert run("--regex", "[0-9]{2}") == 1
    cut, whole = answers()
    assert cut["end"] == "length" and len(cut["text"]) < 2 and "unfinished" in cut["error"]
    assert len(whole["text"]) == 2 and "error" not in whole


def test_nothing_is_done_twice(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ask(*sums(3), {"prompt": ""})
    assert run() == 1
    before = Path("out.jsonl").read_bytes()
    capfd.readouterr()
    assert run() == 1  # the error is still there
    assert Path("out.jsonl").read_bytes() == before
    err = capfd.readouterr().err.splitlines()
    assert err == [
        "4 of 4 lines are answered already",
        'error: 1 line of 4 has an "error" in the output; --retry asks them again',
    ]
    assert run("--retry") == 1 and answers()[3]["error"] == "the prompt is empty"
    ask(*sums(3), "What is 2 + 2?")  # what was wrong with the line is mended
    assert run() == 2
    assert "--retry asks a line again whose answer is an error" in capfd.readouterr().err
    assert run("--retry") == 0 and answers()[3]["text"] == "4"
    Path("out.jsonl").write_bytes(b"".join(before.splitlines(keepends=True)[:3]))
    ask(*sums(3), "What is 1 + 1?")  # more can be asked later
    assert run() == 0
    assert answers()[3]["text"] == "2" and Path("out.jsonl").read_bytes().startswith(
        b"".join(before.splitlines(keepends=True)[:3])
    )


def test_what_failed_is_asked_again_where_that_is_wished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_tg.slots import Slots

    ask(*sums(4))
    step, calls = Slots.step, []

    def broken(self: Slots, new: Any) -> Any:
        calls.append(new)
        found = step(self, new)
        return found | {slot: DeviceError("out of order") for slot in found if len(calls) == 8}

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "step", broken)
        assert run("--batch", "2") == 1
    failed = [answer["line"] for answer in answers() if "error" in answer]
    assert failed and len(failed) < 4 and "thinking" in answers()[failed[0] - 1]
    whole = [answer for answer in answers() if "error" not in answer]
    assert run("--retry") == 0
    assert [answer["text"] for answer in answers()] == ["122", "11", "17", "579"]
    assert all(answer in answers() for answer in whole)


@pytest.mark.parametrize("at", [1, 40, -1])
def test_an_unfinished_line_at_the_end_is_answered_again(
    folder: Path, capfd: pytest.CaptureFixture[str], at: int
) -> None:
    ask(*sums(3))
    assert run("--seed", "1") == 0
    whole = Path("out.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    Path("out.jsonl").write_bytes(whole[: last + at] if at > 0 else whole[:at])
    capfd.readouterr()
    assert run("--seed", "1") == 0
    assert Path("out.jsonl").read_bytes() == whole
    first = capfd.readouterr().err.splitlines()[0]
    assert (
        first == "2 of 3 lines are answered already; an unfinished line at the end was taken away"
    )


def test_killed_in_the_middle_it_goes_on_without_loss_or_repetition(folder: Path) -> None:
    ask(*sums() * 6)
    line = [sys.executable, "-m", "qwen3_tg", "generate", "--input", "in.jsonl"]
    line += ["--output", "out.jsonl", "--temperature", "0", "--batch", "2"]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    out = Path("out.jsonl")
    deadline = time.monotonic() + 100
    while (not out.exists() or out.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    done = before.count(b"\n")
    assert 5 <= done < 48
    kept = before[: before.rindex(b"\n") + 1].splitlines()
    assert run("--batch", "2") == 0
    found = answers()
    assert [answer["line"] for answer in found] == list(range(1, 49))
    assert [answer["text"] for answer in found] == [str(a + b) for a, b in SUMS] * 6
    assert set(kept) <= set(out.read_bytes().splitlines())


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "1"],
        ["--thinking", "off"],
        ["--max-new-tokens", "3"],
        ["--seed", "4"],
        ["--system", "x"],
        ["--kv-dtype", "float32"],
        ["--kernels", "exact"],
        ["--context", "1000"],
        ["--regex", "[0-9]+"],
    ],
)
def test_answers_of_other_options_are_not_mixed(
    folder: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    ask(*sums(1))
    assert run() == 0
    before = Path("out.jsonl").read_bytes()
    capfd.readouterr()
    assert run(*options) == 2
    assert "--output out.jsonl, line 1 answers another prompt" in capfd.readouterr().err
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_nor_are_those_of_a_model_whose_text_side_or_shape_changed(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    ask(*sums(1))
    shutil.copytree(TINY, "model")
    assert run("--model", "model") == 0
    file = Path("model", name)
    changed = {"rope_theta": 10_001.0} if name == "config.json" else {}
    text = file.read_text(encoding="utf-8")
    file.write_text(json.dumps(json.loads(text) | changed) if changed else text + "\n")
    assert run("--model", "model") == 2
    assert "--output out.jsonl, line 1 answers another prompt" in capfd.readouterr().err


def test_a_default_that_is_named_changes_nothing(folder: Path) -> None:
    ask(*sums(1))
    assert run() == 0
    named = "--thinking on --kv-dtype float16 --kernels fast --context 2048 --device CPU"
    assert run(*named.split()) == 0


@pytest.mark.parametrize(
    "content",
    [
        *[b"a text\n", b'{"line": 1}\n', b"[]\n", b'{"line": 7, "key": "x"}\n', b"\n", b"notes"],
        *[b'{"line": [1], "key": "x"}\n', b'{"line": 9, "key": null}\n', b'"a prompt"'],
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(
    folder: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    ask(*sums(1))
    Path("out.jsonl").write_bytes(content)
    assert run() == 2
    assert "--output out.jsonl, line 1" in capfd.readouterr().err
    assert Path("out.jsonl").read_bytes() == content


@pytest.mark.parametrize("name", ["in.jsonl", "link.jsonl", "/dev/null", "."])
def test_what_is_no_place_for_answers_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    Path("in.jsonl").write_bytes(b'"What is 1 + 1?"')  # without an end of its line
    Path("link.jsonl").symlink_to("in.jsonl")
    assert main(["generate", "--input", "in.jsonl", "--output", name]) == 2
    error = capfd.readouterr().err
    right = "no regular file" if name in ("/dev/null", ".") else "is the --input itself"
    assert right in error and len(error.splitlines()) == 1
    assert Path("in.jsonl").read_bytes() == b'"What is 1 + 1?"'


def test_without_a_place_to_sort_them_answers_stay_as_they_ended(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_tg.cli import batch_files

    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    ask(*sums(4))
    monkeypatch.setattr(batch_files, "replacing", refused)
    assert run("--batch", "4") == 0
    assert sorted(answer["line"] for answer in answers()) == [1, 2, 3, 4]
    assert "cannot be put in the order of the input: Permission denied" in capfd.readouterr().err


def test_ctrl_c_says_how_far_it_is(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_tg.cli.batch_files import Answers

    ask(*sums(5))
    write = Answers.write

    def pressed(self: Answers, *answer: Any) -> None:
        write(self, *answer)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "write", pressed)
    assert run("--batch", "2") == 130
    assert "2 of 5 lines are answered; the same command goes on\n" in capfd.readouterr().err
    monkeypatch.setattr(Answers, "write", write)
    assert run("--batch", "2") == 0
    assert [answer["text"] for answer in answers()] == [str(a + b) for a, b in SUMS[:5]]


def test_two_processes_do_not_write_to_one_file(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(*sums(1))
    with Path("out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run() == 2
    assert "another process is writing to it" in capfd.readouterr().err


def test_it_reads_stdin_and_writes_to_stdout(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b'"What is 5 + 6?"\n\n  \n"What is 1 + 1?"'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["generate", "--input", "-", "--temperature", "0"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {answer["line"]: answer["text"] for answer in found} == {1: "11", 4: "2"}
    assert [path.name for path in folder.iterdir()] == []


def test_a_lines_stop_and_biases_stand_in_place_of_the_commands(folder: Path) -> None:
    llm = qwen3_tg.load("tiny")
    assert llm.tokenizer
    one, two = (llm.tokenizer.encode(digit)[0] for digit in "12")
    ask(
        "1 + 1 = ",
        {"prompt": "1 + 1 = ", "logit_bias": {str(two): 1000}},
        {"prompt": "1 + 1 = ", "logit_bias": {str(two): 1000}, "stop": "2"},
        {"prompt": "1 + 1 = ", "stop": []},
    )
    command = ["--logit-bias", f"{one}=1000", "--stop", "11", "--max-new-tokens", "3"]
    assert run("--raw", "--no-loop-guard", *command) == 0
    assert [answer["text"] for answer in answers()] == ["", "222", "", "111"]
    assert [answer["end"] for answer in answers()] == [
        *["stop_string", "length", "stop_string", "length"]
    ]


def test_a_bias_of_no_token_is_an_error_of_its_line(folder: Path) -> None:
    ask({"prompt": "1 + 1 = ", "logit_bias": {"800": 1}}, *sums(1))
    assert run() == 1
    wrong, right = answers()
    assert wrong["error"] == "logit_bias is of token 800; the last is 799"
    assert right["text"] == "122"


def test_raw_lines_are_continued_as_they_are(folder: Path) -> None:
    ask("1 + 1 = ", {"prompt": "5", "thinking": "off"}, {"messages": []})
    assert run("--raw", "--max-new-tokens", "2") == 1
    first, *wrong = answers()
    assert first["answer_tokens"] == 2 and "thinking" not in first
    assert [answer["error"] for answer in wrong] == [
        "'thinking' has no meaning with --raw",
        "'messages' has no meaning with --raw",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "nowhere.jsonl"], "--input nowhere.jsonl: not readable: No such file"),
        (["--input", "."], "--input .: not readable: Is a directory"),
        (["--input", "empty"], "--input empty: no line in it"),
        (["--input", "in.jsonl", "--output", "a/b"], "--output a/b: No such file or directory"),
        (["--input", "in.jsonl", "--batch", "0"], "--batch must be at least 1"),
        (["--input", "in.jsonl", "a prompt"], "the prompts are those of --input"),
        (["--input", "in.jsonl", "--n", "2"], "--n is for one prompt"),
        (["--input", "in.jsonl", "--explain"], "--explain is for one prompt"),
        (["--input", "in.jsonl", "--record", "x"], "--record is for one prompt"),
        (["--input", "in.jsonl", "--speculate", "lookup"], "--speculate guesses for one prompt"),
        (["--input", "in.jsonl", "--temperature", "-1"], "temperature must be at least 0"),
        (["--output", "out.jsonl", "a prompt"], "--output is for the prompts of --input FILE"),
        (["--input", "in.jsonl", "--prefix-cache", "1GB"], "--prefix-cache is for conversations"),
        (["--retry", "a prompt"], "--retry is for the prompts of --input FILE"),
        (["--batch", "2", "a prompt"], "--batch is for the prompts of --input FILE"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_loads(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    ask(*sums(1))
    Path("empty").write_bytes(b"\n  \n")
    monkeypatch.setattr("qwen3_tg.cli.generate.load", None)
    assert main(["generate", *options]) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {message}")
    assert not Path("out.jsonl").exists()
