"""What is computed of a conversation, in a file beside it: used where it fits, refused with the
reason where it does not, and never a reason to lose anything."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwen3_tg
from qwen3_tg import prefix_file
from qwen3_tg.cli import main
from qwen3_tg.errors import UsageError
from qwen3_tg.generate import Engine
from qwen3_tg.shelf import Kept

SUM = "What is 37 + 85?"
PLAIN = ("--temperature", "0")
FACTS = {"model": "a", "dtype": "float32"}
TEXT = Kept([5, 6, 7], [np.arange(12, dtype=np.uint8).reshape(3, 4)] * 2, 3)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`qwen3 chat --session FILE` with these lines from a pipe; how many positions it computed."""
    step, computed = Engine._run, [0]

    def counted(self: Engine, kind: str, new: list[int], start: int) -> np.ndarray:
        computed[0] += len(new)
        return step(self, kind, new, start)

    monkeypatch.setattr(Engine, "_run", counted)

    def chat(file: Path, *lines: str, options: tuple[str, ...] = PLAIN, exit_code: int = 0) -> int:
        computed[0] = 0
        stdin = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, encoding="utf-8"))
        assert main(["chat", "--session", str(file), *options]) == exit_code
        return computed[0]

    return chat


def beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.kv")


def texts(file: Path) -> list[str]:
    return [message["content"] for message in json.loads(file.read_text())["messages"]]


@pytest.fixture
def kept(tmp_path: Path, run: Callable[..., int]) -> Path:
    """A session of two turns."""
    file = tmp_path / "s"
    run(file, SUM, "now add 12")
    assert sorted(os.listdir(tmp_path)) == ["s", "s.kv"]  # noqa: PTH208
    return file


class TestGoingOn:
    def test_a_later_process_computes_only_the_new_turn_and_answers_the_same(
        self, kept: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        without = kept.with_name("without")
        without.write_bytes(kept.read_bytes())
        all_of_it = run(without, "now add 30")
        assert "computed already" not in capsys.readouterr().err
        new = run(kept, "now add 30")
        (told,) = [x for x in capsys.readouterr().err.splitlines() if "computed already" in x]
        restored = int(told.split()[0].strip("("))
        # the last answer is computed again: in a later prompt no thinking goes before it
        assert restored > 32 and all_of_it - new == restored
        assert texts(kept) == texts(without) and texts(kept)[4:] == ["now add 30", "164"]

    def test_it_goes_on_in_a_process_of_its_own(
        self, kept: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [sys.executable, "-m", "qwen3_tg", "chat", "--session", str(kept)]
        paths = [str(Path(qwen3_tg.__file__).parents[1]), *sys.path]
        done = subprocess.run(
            command,
            input="now add 30\n",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "tokens of it are computed already" in done.stderr
        assert done.stdout == "164\n"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_it_goes_on_in_any_type(
        self, dtype: str, tmp_path: Path, run: Callable[..., int]
    ) -> None:
        options = (*PLAIN, "--kernels", "generic", "--kv-dtype", dtype)
        run(tmp_path / "s", SUM, "now add 12", options=options)
        first = len(load_file(beside(tmp_path / "s"))["ids"])
        without = tmp_path / "without"
        without.write_bytes((tmp_path / "s").read_bytes())
        all_of_it = run(without, "now add 30", options=options)
        assert run(tmp_path / "s", "now add 30", options=options) == all_of_it - first
        assert texts(tmp_path / "s") == texts(without)

    def test_it_is_private_and_a_chosen_mode_stays(
        self, kept: Path, run: Callable[..., int]
    ) -> None:
        assert stat.S_IMODE(beside(kept).stat().st_mode) == 0o600
        beside(kept).chmod(0o640)
        run(kept, "now add 30")
        assert stat.S_IMODE(beside(kept).stat().st_mode) == 0o640

    def test_a_turn_that_is_taken_back_leaves_only_what_is_still_true(
        self, kept: Path, run: Callable[..., int]
    ) -> None:
        first = load_file(beside(kept))["ids"].tolist()
        run(kept, "now add 30")
        assert (longer := len(load_file(beside(kept))["ids"])) > len(first)
        run(kept, "/undo")
        left = load_file(beside(kept))["ids"].tolist()
        assert left[: len(first)] == first and len(left) < longer

    def test_an_old_file_is_used_as_far_as_it_goes(
        self, kept: Path, run: Callable[..., int]
    ) -> None:
        old = beside(kept).read_bytes()
        expected = kept.with_name("expected")
        run(expected, SUM, "now add 12", "now add 30", "now add 5")
        run(kept, "now add 30")
        beside(kept).write_bytes(old)
        run(kept, "now add 5")
        assert texts(kept) == texts(expected)
        run(kept, "/clear")
        assert texts(kept) == []
        run(kept, SUM)
        assert texts(kept) == texts(expected)[:2]

    def test_nothing_is_written_where_it_is_there_already(
        self, kept: Path, run: Callable[..., int]
    ) -> None:
        before = beside(kept).stat()
        run(kept)
        after = beside(kept).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)

    def test_save_and_load_keep_it_too(
        self,
        tmp_path: Path,
        kept: Path,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        other = tmp_path / "other"
        run(kept, f"/save {other}", "/clear", "hi", f"/load {other}", "now add 30")
        err = capsys.readouterr().err
        assert f"(4 messages in {other}, what is computed of" in err
        assert "tokens of it are computed already" in err
        assert texts(kept)[0] == "hi" and beside(other).exists()
        (tmp_path / "third.kv").write_text("mine")
        run(kept, f"/save {tmp_path / 'third'}", exit_code=1)
        assert "third.kv: there is such a file" in capsys.readouterr().err
        assert (tmp_path / "third.kv").read_text() == "mine"

    def test_ctrl_c_leaves_it_there(
        self, tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qwen3_tg.cli.commands import COMMANDS, Command

        def press(commands: object, argument: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setitem(COMMANDS, "/stats", Command("/stats", "", press))
        with pytest.raises(AssertionError):  # its exit code is 130
            run(tmp_path / "s", SUM, "now add 12", "/stats")
        assert beside(tmp_path / "s").exists() and len(texts(tmp_path / "s")) == 4


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (("--kv-dtype", "float32"), "another kv_dtype: float16; here it is float32"),
            (("--kernels", "generic", "--kv-dtype", "float16"), "another kernels: fast; here"),
            (("--model", "MODEL"), "another model, by its fingerprint: "),
        ],
    )
    def test_by_another_way_to_compute(
        self,
        options: tuple[str, ...],
        error: str,
        kept: Path,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if "MODEL" in options:
            options = ("--model", str(changed_tiny(kept.with_name("model"))))
        capsys.readouterr()
        run(kept, "now add 30", options=(*PLAIN, *options))
        (note,) = [x for x in capsys.readouterr().err.splitlines() if "computed anew" in x]
        assert note.startswith(f"note: {beside(kept)}: computed with {error}")
        assert len(texts(kept)) == 6
        run(kept, options=(*PLAIN, *options))
        assert "computed already" in capsys.readouterr().err, "it has been written again"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-1],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        ],
        ids=["empty", "one byte less", "half of it", "one bit"],
    )
    def test_a_damaged_file_is_told_once_and_nothing_is_lost(
        self,
        damage: Callable[[bytes], bytes],
        kept: Path,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        beside(kept).write_bytes(damage(beside(kept).read_bytes()))
        capsys.readouterr()
        run(kept, "now add 30")
        out, err = capsys.readouterr()
        (note,) = [line for line in err.splitlines() if "computed anew" in line]
        assert note.startswith(f"note: {beside(kept)}: damaged")
        assert texts(kept) == [SUM, "122", "now add 12", "134", "now add 30", "164"]
        assert out == "164\n"
        run(kept)
        assert "computed already" in capsys.readouterr().err, "it has been written again"

    @pytest.mark.parametrize("content", [b"years of work", b"\xff" * 100])
    def test_what_is_not_ours_beside_an_old_session_stays(
        self,
        content: bytes,
        kept: Path,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        beside(kept).write_bytes(content)
        capsys.readouterr()
        run(kept, "now add 30")
        out, err = capsys.readouterr()
        assert out == "164\n" and "computed anew" in err
        assert f"note: {beside(kept)} is none of ours, and stays" in err
        assert beside(kept).read_bytes() == content

    @pytest.mark.parametrize("options", [(), ("--prefix-cache", "0")])
    def test_of_what_was_cleared_nothing_stays(
        self, options: tuple[str, ...], kept: Path, run: Callable[..., int]
    ) -> None:
        assert beside(kept).exists()
        run(kept, options=(*PLAIN, *options))
        assert beside(kept).exists()
        run(kept, "/clear", options=(*PLAIN, *options))
        assert texts(kept) == [] and not beside(kept).exists()

    def test_a_file_of_someone_else_is_not_written_over(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "s.kv").write_text("years of work")
        assert main(["chat", "--session", str(tmp_path / "s")]) == 2
        assert "there is such a file" in capsys.readouterr().err
        assert (tmp_path / "s.kv").read_text() == "years of work"
        assert not (tmp_path / "s").exists()


class TestLimit:
    def test_more_than_the_limit_is_announced_once_and_not_written(
        self, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = (*PLAIN, "--prefix-cache", "20KB")
        file = tmp_path / "s"
        run(file, SUM, "now add 12", f"/save {file}", f"/save {file}", options=options)
        (note,) = [x for x in capsys.readouterr().err.splitlines() if "--prefix-cache" in x]
        assert "bytes, is not kept in" in note and "--prefix-cache is 20,000" in note
        assert not beside(file).exists() and len(texts(file)) == 4

    def test_a_file_beyond_the_limit_is_not_loaded(
        self, kept: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        size = beside(kept).stat().st_size
        run(kept, options=(*PLAIN, "--prefix-cache", "1KB"))
        err = capsys.readouterr().err
        assert f"its {size:,} bytes are more than the 1,000 of --prefix-cache" in err
        assert beside(kept).stat().st_size == size

    def test_with_0_there_is_no_file_and_no_word(
        self, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "s"
        run(file, SUM, f"/save {file}", options=(*PLAIN, "--prefix-cache", "0"))
        assert not beside(file).exists()
        err = capsys.readouterr().err
        assert "computed" not in err and "kv" not in err

    @pytest.mark.parametrize("size", ["", "-1", "much"])
    def test_what_is_no_size_is_refused(
        self, size: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["chat", f"--prefix-cache={size}"]) == 2
        assert "--prefix-cache must be a size such as" in capsys.readouterr().err


class TestCrash:
    """Whatever breaks off while it is written, what was there before is there still."""

    @pytest.mark.parametrize("at", ["save_file", "replace", "fsync"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_neither_file_is_lost(
        self,
        at: str,
        error: BaseException,
        kept: Path,
        run: Callable[..., int],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = beside(kept).read_bytes()
        real: dict[str, Any] = {"replace": Path.replace, "fsync": os.fsync}
        saving = False

        def save(tensors: Any, path: Path, header: Any) -> None:
            nonlocal saving
            saving = True
            if at == "save_file":
                path.write_bytes(b"half of it")
                raise error
            save_file(tensors, path, header)

        def broken(name: str) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                if saving and at == name:
                    raise error
                return real[name](*given)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(prefix_file, "save_file", save)
            patch.setattr(Path, "replace", broken("replace"))
            patch.setattr(os, "fsync", broken("fsync"))
            if isinstance(error, KeyboardInterrupt):
                with pytest.raises(AssertionError):  # its exit code is 130
                    run(kept, "now add 30")
            else:
                run(kept, "now add 30")
                assert "cannot be written: No space left" in capsys.readouterr().err
        assert saving and beside(kept).read_bytes() == before
        assert texts(kept)[4:] == ["now add 30", "164"]
        assert sorted(path.name for path in kept.parent.iterdir()) == ["s", "s.kv"]
        run(kept, "now add 5")
        assert "tokens of it are computed already" in capsys.readouterr().err

    def test_a_process_that_is_killed_leaves_the_old_files(self, kept: Path) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path\n"
            "from qwen3_tg import prefix_file; from qwen3_tg.cli import main\n"
            "def die(tensors, path, header):\n"
            "    path.write_bytes(b'half of it'); os.kill(os.getpid(), signal.SIGKILL)\n"
            "prefix_file.save_file = die\n"
            "main(['chat', '--session', sys.argv[1]])\n"
        )
        before = beside(kept).read_bytes()
        paths = [str(Path(qwen3_tg.__file__).parents[1]), *sys.path]
        done = subprocess.run(
            [sys.executable, "-c", code, str(kept)],
            input=b"now add 30\n",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == -9
        assert beside(kept).read_bytes() == before and len(texts(kept)) == 6


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        prefix_file.write(tmp_path / "f", TEXT, FACTS)
        found = prefix_file.read(tmp_path / "f", FACTS, [4, 4])
        assert found.ids == TEXT.ids and found.prompt == 3
        assert all(np.array_equal(a, b) for a, b in zip(found.rows, TEXT.rows, strict=True))
        assert prefix_file.is_one(tmp_path / "f")

    @pytest.mark.parametrize(
        ("tensors", "header", "error"),
        [
            ({}, {"format": "other"}, "not a file that qwen3_tg wrote"),
            ({}, {"version": "2"}, "of version '2'; this qwen3_tg reads '1'"),
            ({}, {"dtype": "float16"}, "computed with another dtype: float16; here it is float32"),
            ({}, {"sha256": "0"}, "the checksum is another one"),
            ({"ids": np.array([5, 6, 8], np.int32)}, {}, "the checksum is another one"),
            ({"rows.1": np.zeros((3, 4), np.uint8)}, {}, "the checksum is another one"),
            ({"rows.1": np.zeros((2, 4), np.uint8)}, {}, "other shapes than this model's"),
            ({"rows.1": np.zeros((3, 4), np.int8)}, {}, "other shapes than this model's"),
            ({"ids": np.array([[5, 6, 7]], np.int32)}, {}, "other shapes than this model's"),
            ({"more": np.zeros(1, np.uint8)}, {}, "other tensors than this model keeps"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_the_reason(
        self, tmp_path: Path, tensors: dict[str, Any], header: dict[str, str], error: str
    ) -> None:
        from safetensors import safe_open

        file = tmp_path / "f"
        prefix_file.write(file, TEXT, FACTS)
        with safe_open(file, framework="numpy") as opened:
            found = opened.metadata()
        save_file(load_file(file) | tensors, file, found | header)
        with pytest.raises(UsageError, match=error):
            prefix_file.read(file, FACTS, [4, 4])

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            prefix_file.read(tmp_path, FACTS, [4, 4])


def changed_tiny(folder: Path) -> Path:
    """The embedded model with one other weight."""
    folder.mkdir()
    for file in (Path(qwen3_tg.__file__).parent / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2] ^= 1  # the last bit of the last weight's mantissa
    (folder / "model.safetensors").write_bytes(data)
    return folder
