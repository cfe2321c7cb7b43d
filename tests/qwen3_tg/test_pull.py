"""`qwen3 pull` against a hub on loopback that cuts, lies, stalls and refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from format_writers.gguf_file import gguf_parts, write_gguf
from format_writers.model import random_model
from hub_server import COMMIT, Fault, Hub, serve, use

from qwen3_tg.checkpoint import locate, open_checkpoint
from qwen3_tg.checkpoint.gguf_names import choose_gguf, gguf_models
from qwen3_tg.cli import main
from qwen3_tg.errors import CheckpointError

NAME = "Qwen/Qwen3-0.6B"
GGUF = "Qwen/Qwen3-8B-GGUF"
WEIGHTS = "model.safetensors"
SIZE = (GOLDEN / "tied_float32" / WEIGHTS).stat().st_size
NOT_NEEDED = {"README.md": b"# Qwen", "pytorch_model.bin": b"pickle", "vocab.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        use(hub, tmp_path / "hub", monkeypatch)
        hub.add(NAME, GOLDEN / "tied_float32", **NOT_NEEDED)
        rng = random.Random(1)
        hub.add(
            GGUF,
            **{
                "Qwen3-8B-Q4_K_M.gguf": rng.randbytes(5000),
                "Qwen3-8B-Q8_0-00001-of-00002.gguf": rng.randbytes(4000),
                "Qwen3-8B-Q8_0-00002-of-00002.gguf": rng.randbytes(3000),
                "params": b"{}",
            },
        )
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's folder in the cache."""
    return tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"


def pull_fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line of a pull that fails."""
    assert main(["pull", *(arguments or (NAME,))]) == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and err.endswith(errors[0] + "\n"), err
    return errors[0]


def nothing_half_is_there(folder: Path, hub: Hub) -> bool:
    """Whatever has a final name, in the snapshot or as a blob, is whole and right."""
    named = [path for path in (folder / "snapshots").rglob("*") if path.is_file()]
    named += [path for path in (folder / "blobs").glob("*") if path.suffix != ".incomplete"]
    whole = set(hub.models[NAME].values())
    assert not list(folder.rglob("*.tmp"))
    return all(path.read_bytes() in whole for path in named)


class TestPull:
    def test_a_pulled_model_is_found_and_opened(
        self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", "Qwen3-0.6B"]) == 0
        out, err = capsys.readouterr()
        snapshot = folder / "snapshots" / COMMIT
        assert out == f"{snapshot}\n"
        assert "3 files, 117.1 kB to fetch; " in err.splitlines()[0]
        assert err.splitlines()[-1] == f"use it with: qwen3 --model {NAME}"
        assert sorted(path.name for path in snapshot.iterdir()) == [
            "config.json",
            "generation_config.json",
            WEIGHTS,
        ]
        found, expected = open_checkpoint(NAME), open_checkpoint(str(GOLDEN / "tied_float32"))
        for name, weight in expected.weights.items():
            np.testing.assert_array_equal(found.weights[name].arrays["data"], weight.arrays["data"])

    def test_huggingface_hub_takes_it_as_its_own(self, hub: Hub, folder: Path) -> None:
        from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

        assert main(["pull", NAME]) == 0
        asked = len(hub.log)
        assert snapshot_download(NAME, local_files_only=True) == str(folder / "snapshots" / COMMIT)
        assert Path(hf_hub_download(NAME, WEIGHTS, revision=COMMIT)).stat().st_size == SIZE
        assert len(hub.log) == asked
        (repo,) = scan_cache_dir(folder.parent).repos
        assert repo.repo_id == NAME and repo.nb_files == 3

    def test_a_second_pull_fetches_nothing(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", NAME]) == 0
        capsys.readouterr()
        hub.log.clear()
        assert main(["pull", NAME, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "all here already" in err
        assert hub.log == [("", None)]
        answer = json.loads(out)
        assert answer["fetched_bytes"] == 0 and answer["model"] == NAME
        assert {file["name"]: file["fetched"] for file in answer["files"]}[WEIGHTS] is False

    def test_only_the_shards_of_the_index(self, hub: Hub, tmp_path: Path) -> None:
        hub.add(NAME, GOLDEN / "sharded_bfloat16", **{"other.safetensors": b"x", **NOT_NEEDED})
        assert main(["pull", NAME]) == 0
        names = {path.name for path in locate(NAME).iterdir()}
        assert len([name for name in names if name.endswith(".safetensors")]) == 4
        assert not names & {"other.safetensors", *NOT_NEEDED}
        assert open_checkpoint(NAME).weights

    def test_a_model_with_its_tokenizer(self, hub: Hub) -> None:
        hub.add(NAME, locate("tiny"))
        assert main(["pull", NAME]) == 0
        assert open_checkpoint(NAME).tokenizer is not None

    def test_a_revision_that_is_not_main(
        self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", NAME, "--revision", COMMIT]) == 0
        assert not (folder / "refs").exists()
        assert locate(NAME) == folder / "snapshots" / COMMIT
        (folder / "snapshots" / "other").mkdir()
        assert main(["pull", NAME, "--revision", COMMIT]) == 0
        assert f"qwen3 --model {folder / 'snapshots' / COMMIT}\n" in capsys.readouterr().err

    def test_where_links_cannot_be_made_the_files_are_moved(
        self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: Path, target: object, target_is_directory: bool = False) -> None:
            raise OSError("no links here")

        hub.models[NAME]["generation_config.json"] = hub.models[NAME]["config.json"]
        monkeypatch.setattr(Path, "symlink_to", refuse)
        monkeypatch.setattr(Path, "hardlink_to", refuse)
        for _ in range(2):
            assert main(["pull", NAME]) == 0
            assert open_checkpoint(NAME).weights
            assert nothing_half_is_there(folder, hub)
        assert list((folder / "blobs").iterdir()) == []
        assert len(hub.ranges(WEIGHTS)) == 1


class TestGguf:
    def test_a_type_of_a_plain_name_comes_from_its_gguf_repository(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add("Qwen/Qwen3-8B", GOLDEN / "tied_float32")
        assert main(["pull", "Qwen3-8B", "--type", "q4_k_m"]) == 0
        out, err = capsys.readouterr()
        assert f"use it with: qwen3 --model {GGUF}\n" in err
        file = Path(out.strip())
        assert file.name == "Qwen3-8B-Q4_K_M.gguf"
        assert file.read_bytes() == hub.models[GGUF][file.name]
        assert locate(GGUF) == locate(f"{GGUF}:Q4_K_M") == locate("Qwen3-8B:q4_k_m") == file
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_all_parts_come_and_a_second_type_is_told_apart(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", f"{GGUF}:Q4_K_M"]) == 0
        assert main(["pull", GGUF, "--type", "Q8_0"]) == 0
        assert f"use it with: qwen3 --model {GGUF}:Q8_0\n" in capsys.readouterr().err
        first = locate(f"{GGUF}:Q8_0")
        assert first.name == "Qwen3-8B-Q8_0-00001-of-00002.gguf"
        assert first.with_name("Qwen3-8B-Q8_0-00002-of-00002.gguf").exists()
        with pytest.raises(CheckpointError, match=f"{GGUF}:Q4_K_M or --model {GGUF}:Q8_0"):
            locate(GGUF)
        with pytest.raises(CheckpointError, match="no GGUF of type 'Q2_K'; there are Q4_K_M, Q8_0"):
            locate(f"{GGUF}:Q2_K")

    @pytest.mark.parametrize("split", [1, 2])
    def test_a_pulled_gguf_is_opened(self, hub: Hub, tmp_path: Path, split: int) -> None:
        config, weights = random_model()
        written = tmp_path / "written" / "Qwen3-8B-Q8_0.gguf"
        values = write_gguf(written, config, weights, "Q8_0", split=split)
        hub.models[GGUF] = {path.name: path.read_bytes() for path in gguf_parts(written)}
        assert main(["pull", f"{GGUF}:Q8_0"]) == 0
        assert locate(GGUF).parent.parent.name == "snapshots"
        assert set(open_checkpoint(GGUF).weights) == set(values)

    def test_without_a_type_the_types_are_listed(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = pull_fails(capsys, GGUF)
        assert "say which with --type" in error and "Q4_K_M (5.0 kB), Q8_0 (7.0 kB)" in error

    def test_a_type_that_is_not_there(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        error = pull_fails(capsys, GGUF, "--type", "Q2_K")
        assert "no GGUF of type 'Q2_K'; there are Q4_K_M, Q8_0" in error
        assert "has no GGUF files" in pull_fails(capsys, NAME, "--type", "Q2_K")

    def test_names_of_types(self) -> None:
        names = """
            M-Q4_K_M.gguf M.Q8_0.gguf M-UD-Q4_K_XL.gguf M-IQ4_XS.gguf M-bf16.gguf M-F16.gguf
            BF16/M-BF16-00001-of-00002.gguf BF16/M-BF16-00002-of-00002.gguf m.gguf mmproj-F16.gguf
            M-MXFP4_MOE.gguf README.md
        """.split()
        assert sorted(gguf_models(names)) == sorted(
            "Q4_K_M Q8_0 UD-Q4_K_XL IQ4_XS M-bf16 F16 BF16/M-BF16 m MXFP4_MOE".split()
        )
        assert choose_gguf(names, "q4_k_xl", "M") == ["M-UD-Q4_K_XL.gguf"]
        with pytest.raises(CheckpointError, match="Q8_0 has 1 of its 3 parts"):
            choose_gguf(["M-Q8_0-00002-of-00003.gguf"], "Q8_0", "M")


class TestFaults:
    @pytest.mark.parametrize("kind", ["cut", "stall"])
    def test_a_cut_is_continued_by_itself(
        self, hub: Hub, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.faults[WEIGHTS] = [Fault(kind, 50_000), Fault(kind, 0)]
        assert main(["pull", NAME]) == 0
        assert hub.ranges(WEIGHTS) == [None, "bytes=50000-", "bytes=50000-"]
        text = "connection to the hub was cut" if kind == "cut" else "nothing came from the hub for"
        assert f"{text}" in (err := capsys.readouterr().err)
        assert "trying again in 0 s (1 of 5)" in err and "(2 of 5)" in err
        assert open_checkpoint(NAME).weights

    def test_after_the_last_try_a_second_pull_goes_on_where_it_stopped(
        self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.faults[WEIGHTS] = [Fault("cut", 50_000)]
        hub.always[WEIGHTS] = Fault("cut", 0)
        error = pull_fails(capsys)
        assert "cut, 6 times; the same command goes on where it stopped" in error
        assert nothing_half_is_there(folder, hub)
        assert not (folder / "refs").exists() and not (folder / "snapshots").exists()
        with pytest.raises(CheckpointError, match=f"get it with: qwen3 pull {NAME}"):
            locate(NAME)
        hub.always.clear()
        hub.log.clear()
        assert main(["pull", NAME]) == 0
        assert hub.log == [("", None), (WEIGHTS, "bytes=50000-")]
        assert "66.2 kB to fetch (50.9 kB of 117.1 kB here already)" in capsys.readouterr().err
        assert open_checkpoint(NAME).weights

    def test_wrong_bytes_are_fetched_once_more_from_the_start(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.faults[WEIGHTS] = [Fault("wrong")]
        assert main(["pull", NAME]) == 0
        assert (
            "has not the sum that the hub announces; starting it again" in capsys.readouterr().err
        )
        assert hub.ranges(WEIGHTS) == [None, None]
        assert open_checkpoint(NAME).weights

    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            (Fault("wrong"), "has not the sum that the hub announces, twice; it was deleted"),
            (Fault("short", 10), "sends {less} bytes, the hub announces {size}, twice"),
            (Fault("long", 10), "sends {more} bytes, the hub announces {size}, twice"),
            (Fault("gzip"), "sends it compressed, though asked not to, twice"),
        ],
    )
    @pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
    def test_what_is_always_wrong_is_deleted_and_told(
        self,
        hub: Hub,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        fault: Fault,
        text: str,
        file: str,
    ) -> None:
        hub.always[file] = fault
        error = pull_fails(capsys)
        size = len(hub.models[NAME][file])
        assert text.format(size=size, less=size - 10, more=size + 10) in error
        assert file in error and len(hub.ranges(file)) == 2
        assert nothing_half_is_there(folder, hub)
        assert not list(folder.rglob("*.incomplete"))

    def test_more_bytes_than_announced_are_not_kept(self, hub: Hub, folder: Path) -> None:
        hub.always[WEIGHTS] = Fault("endless", 10_000)
        assert main(["pull", NAME]) == 0
        assert nothing_half_is_there(folder, hub)

    def test_a_begun_file_that_is_damaged_is_fetched_anew(self, hub: Hub, folder: Path) -> None:
        hub.faults[WEIGHTS] = [Fault("cut", 50_000)] + [Fault("cut", 0)] * 5
        assert main(["pull", NAME]) == 1
        (part,) = folder.rglob("*.incomplete")
        part.write_bytes(bytes(50_000))
        assert main(["pull", NAME]) == 0
        assert hub.ranges(WEIGHTS)[-2:] == ["bytes=50000-", None]
        assert open_checkpoint(NAME).weights

    def test_a_server_that_ignores_ranges(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.faults[WEIGHTS] = [Fault("cut", 50_000), Fault("whole")]
        assert main(["pull", NAME]) == 0
        assert "the server cannot continue it; from the start" in capsys.readouterr().err
        assert open_checkpoint(NAME).weights

    def test_another_range_than_asked_for_starts_it_again(self, hub: Hub) -> None:
        hub.faults[WEIGHTS] = [Fault("cut", 50_000), Fault("shift")]
        assert main(["pull", NAME]) == 0
        assert hub.ranges(WEIGHTS) == [None, "bytes=50000-", None]
        assert open_checkpoint(NAME).weights

    @pytest.mark.parametrize("status", [429, 500, 503])
    @pytest.mark.parametrize("file", ["", WEIGHTS])
    def test_a_busy_server_is_asked_again(self, hub: Hub, status: int, file: str) -> None:
        hub.faults[file] = [Fault("status", status=status)] * 2
        assert main(["pull", NAME]) == 0

    def test_the_pause_that_a_server_asks_for(
        self, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.faults[WEIGHTS] = [Fault("status", status=429, headers={"Retry-After": "1"})]
        before = time.monotonic()
        assert main(["pull", NAME]) == 0
        assert time.monotonic() - before > 1
        assert "(HTTP 429); trying again in 1 s" in capsys.readouterr().err
        hub.always[""] = Fault("status", status=429, headers={"ratelimit": '"api";r=0;t=280'})
        assert "come again in 281 s" in pull_fails(capsys)

    @pytest.mark.parametrize(
        ("file", "fault", "text"),
        [
            ("", Fault("status", status=401), "Qwen/Qwen3-0.6B is not on the hub"),
            ("", Fault("status", status=403), "access refused (HTTP 403)"),
            ("", Fault("wrong"), "no list of a model's files"),
            ("", Fault("stall"), "nothing came from the hub for 1 s, 6 times"),
            (
                "",
                Fault("status", 0, 401, {"X-Error-Message": "Invalid credentials in header"}),
                "does not know your token",
            ),
            (WEIGHTS, Fault("status", 0, 403, {"X-Error-Code": "GatedRepo"}), "is gated: agree"),
            (WEIGHTS, Fault("status", status=401), "access refused (HTTP 401); log in with"),
            (WEIGHTS, Fault("status", status=404), "model.safetensors: not found on the hub"),
            (WEIGHTS, Fault("status", status=418), "the hub refuses (HTTP 418)"),
        ],
    )
    def test_refusals_are_one_clear_line(
        self,
        hub: Hub,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        file: str,
        fault: Fault,
        text: str,
    ) -> None:
        hub.always[file] = fault
        assert text in pull_fails(capsys)
        assert nothing_half_is_there(folder, hub)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["Qwen3-0.5B"], "Qwen/Qwen3-0.5B is not on the hub; did you mean Qwen/Qwen3-0.6B"),
            (["no/thing"], "no/thing is not on the hub (if it is private"),
            ([NAME, "--revision", "v9"], "has no revision 'v9'; see"),
            (["a/b/c"], "'a/b/c' is no model name"),
        ],
    )
    def test_names_that_are_not_there(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
    ) -> None:
        assert text in pull_fails(capsys, *arguments)

    @pytest.mark.parametrize("name", ["../../../config.json", "/config.json", "c:config.json"])
    def test_names_of_files_stay_in_the_folder(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        hub.models[NAME][name] = hub.models[NAME].pop("config.json")
        assert f"{NAME} has no config.json on the hub" in pull_fails(capsys)

    def test_a_listing_without_sums_is_refused(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listing = hub.listing(NAME)
        listing["siblings"][0] = listing["siblings"][0] | {"blobId": "../x", "lfs": None}
        monkeypatch.setattr(Hub, "listing", lambda self, name: listing)
        assert "the hub tells no size or sum of" in pull_fails(capsys)

    def test_offline(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set" in pull_fails(capsys)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        error = pull_fails(capsys)
        assert "no connection to http://127.0.0.1:9" in error and "online?" in error


class TestDisk:
    def test_no_room(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        error = pull_fails(capsys)
        assert "needs 117.1 kB more" in error and "has 1.0 kB free" in error
        assert hub.ranges(WEIGHTS) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
    def test_a_disk_that_fills_up(
        self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        siblings = hub.listing(NAME)["siblings"]
        sum = next(s["lfs"]["sha256"] for s in siblings if s["rfilename"] == WEIGHTS)
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / f"{sum}.incomplete").symlink_to("/dev/full")
        assert "the disk is full; the same command goes on" in pull_fails(capsys)
        assert nothing_half_is_there(folder, hub)

    def test_a_cache_that_cannot_be_written(
        self, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "hub").write_text("a file")
        error = pull_fails(capsys)
        assert "cannot write" in error or "not writable" in error

    def test_two_at_once_fetch_it_once(
        self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from filelock import FileLock

        siblings = hub.listing(NAME)["siblings"]
        sum = next(s["lfs"]["sha256"] for s in siblings if s["rfilename"] == WEIGHTS)
        path = folder.parent / ".locks" / folder.name / f"{sum}.lock"
        path.parent.mkdir(parents=True)
        lock = FileLock(path, thread_local=False)
        lock.acquire()
        (folder / "blobs").mkdir(parents=True)

        def other() -> None:
            (folder / "blobs" / sum).write_bytes(hub.models[NAME][WEIGHTS])
            lock.release()

        timer = threading.Timer(1, other)
        timer.start()
        assert main(["pull", NAME]) == 0
        timer.join()
        assert "another program is fetching it" in capsys.readouterr().err
        assert hub.ranges(WEIGHTS) == []


class TestProcess:
    def test_ctrl_c_leaves_what_came_and_a_second_pull_goes_on(
        self, hub: Hub, folder: Path, tmp_path: Path
    ) -> None:
        hub.faults[WEIGHTS] = [Fault("stall", 50_000)]
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
        run = subprocess.Popen(
            [sys.executable, "-m", "qwen3_tg", "pull", NAME],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env | {"HF_HUB_DOWNLOAD_TIMEOUT": "30"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 30
        while not hub.ranges(WEIGHTS) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=30)
        assert (run.returncode, out) == (130, b"")
        assert b"stopped; the same command goes on where it stopped" in err
        assert b"Traceback" not in err
        assert nothing_half_is_there(folder, hub)
        assert main(["pull", NAME]) == 0
        assert hub.ranges(WEIGHTS)[-1] == "bytes=50000-"
        assert open_checkpoint(NAME).weights
