"""Headers of models on the hub, read through range requests from a server on loopback."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GOLDEN
from format_writers.gguf_file import write_gguf
from format_writers.model import random_model
from hub_server import Fault, Hub, serve, use

from qwen3_tg.checkpoint import gguf_header
from qwen3_tg.checkpoint.remote import open_remote, remote_files
from qwen3_tg.checkpoint.safetensors_file import absent_tensors, read_safetensors
from qwen3_tg.errors import CheckpointError

NAME = "Qwen/Qwen3-0.6B"
SHARD = "model-00001-of-00004.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        use(hub, tmp_path, monkeypatch)
        big = random.Random(1).randbytes(10**6)
        hub.add(NAME, GOLDEN / "sharded_bfloat16", **{"big.gguf": big})
        yield hub


class TestRemoteFiles:
    def test_names_and_sizes_come_with_one_request(self, hub: Hub) -> None:
        files = remote_files("Qwen3-0.6B")
        assert {name: f.size for name, f in files.items()} == {
            name: len(data) for name, data in hub.models[NAME].items()
        }
        remote_files("Qwen3-0.6B")
        assert len(hub.log) == 1

    def test_a_model_that_is_not_there_names_near_ones(self, hub: Hub) -> None:
        with pytest.raises(
            CheckpointError, match=r"Qwen/Qwen3-0\.7B is not on the hub; did .*0\.6B"
        ):
            remote_files("Qwen/Qwen3-0.7B")

    def test_offline_is_one_line_and_quick(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        before = time.monotonic()
        with pytest.raises(CheckpointError, match=r"no connection to .* is this machine online"):
            remote_files(NAME)
        assert time.monotonic() - before < 5

    def test_an_answer_that_is_no_listing(self, hub: Hub) -> None:
        hub.always[""] = Fault("wrong")
        with pytest.raises(CheckpointError, match="no list of a model's files"):
            remote_files(NAME)

    def test_a_server_that_is_busy_is_asked_again(self, hub: Hub) -> None:
        hub.faults[""] = [Fault("status", status=429, headers={"Retry-After": "0"})] * 2
        assert remote_files(NAME)
        assert len(hub.log) == 3


class TestOpenRemote:
    def test_the_header_of_a_shard_takes_one_request(self, hub: Hub) -> None:
        size = remote_files(NAME)[SHARD].size
        with open_remote(NAME, SHARD) as file:
            found = absent_tensors(file, size, SHARD)
        expected = read_safetensors(GOLDEN / "sharded_bfloat16" / SHARD)
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            name: (t.dtype, t.shape) for name, t in expected.items()
        }
        assert len(hub.ranges(SHARD)) == 1

    def test_the_long_header_of_a_gguf_takes_few_requests(self, hub: Hub, tmp_path: Path) -> None:
        config, weights = random_model()
        long = {"general.description": "x" * 1_500_000}  # as long as a tokenizer
        path = tmp_path / "m.gguf"
        write_gguf(path, config, weights, "F32", extra_keys=long)
        with path.open("rb") as local:
            expected = gguf_header.read_header(local, path.stat().st_size, "m")
        hub.models[NAME]["m.gguf"] = path.read_bytes()
        with open_remote(NAME, "m.gguf") as file:
            assert gguf_header.read_header(file, remote_files(NAME)["m.gguf"].size, "m") == expected
        assert len(hub.ranges("m.gguf")) < 8

    def test_any_place_can_be_read_in_any_order(self, hub: Hub) -> None:
        data, rng = hub.models[NAME]["big.gguf"], random.Random(2)
        with open_remote(NAME, "big.gguf") as file:
            for _ in range(40):
                at, count = rng.randrange(len(data) + 9), rng.randrange(200_000)
                file.seek(at)
                assert file.read(count) == data[at : at + count]
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:]

    def test_only_what_is_read_is_fetched_and_blocks_grow(self, hub: Hub) -> None:
        data = hub.models[NAME]["big.gguf"]
        with open_remote(NAME, "big.gguf") as file:
            assert file.read(10) == data[:10]
            assert file.raw.fetched_bytes == 100_000  # type: ignore[attr-defined]
            for at in range(10, 700_000, 1000):
                assert file.read(1000) == data[at : at + 1000]
        assert hub.ranges("big.gguf") == [
            "bytes=0-99999",
            "bytes=100000-299999",
            "bytes=300000-699999",
            "bytes=700000-999999",
        ]

    @pytest.mark.parametrize("kind", ["cut", "stall"])
    def test_a_cut_is_continued(self, hub: Hub, kind: str) -> None:
        hub.faults["big.gguf"] = [Fault(kind, 1000), Fault(kind, 0)]
        with open_remote(NAME, "big.gguf") as file:
            assert file.read(5000) == hub.models[NAME]["big.gguf"][:5000]
        assert hub.ranges("big.gguf") == ["bytes=0-99999"] + ["bytes=1000-99999"] * 2

    def test_a_server_that_gives_only_the_whole_is_refused_before_it_is_read(
        self, hub: Hub
    ) -> None:
        hub.models[NAME]["big.gguf"] = bytes(50_000_000)
        hub.always["big.gguf"] = Fault("whole")
        before = time.monotonic()
        with open_remote(NAME, "big.gguf") as file:
            file.seek(2000)
            with pytest.raises(CheckpointError, match=r"only as a whole \(50000000 bytes\)"):
                file.read(1)
            file.seek(0)
            with pytest.raises(CheckpointError, match="only as a whole"):
                file.read(1)
        assert time.monotonic() - before < 1

    @pytest.mark.parametrize(
        ("fault", "text"),
        [
            (Fault("shift"), "asked for bytes from 0 on, got 'bytes 1-"),
            (Fault("long", 7), "sends 1000007 bytes, the hub announces 1000000"),
            (Fault("gzip"), "compressed"),
            (Fault("cut", 0), "cut, 6 times"),
            (Fault("status", status=503), r"HTTP 503\), 6 times"),
            (Fault("status", status=403), "access refused"),
            (Fault("status", status=429, headers={"Retry-After": "999"}), "come again in 999 s"),
        ],
    )
    def test_other_faults_are_one_line(self, hub: Hub, fault: Fault, text: str) -> None:
        hub.always["big.gguf"] = fault
        with open_remote(NAME, "big.gguf") as file, pytest.raises(CheckpointError, match=text) as e:
            file.read(1)
        assert "\n" not in str(e.value)

    def test_a_file_that_is_not_in_the_listing(self, hub: Hub) -> None:
        with pytest.raises(CheckpointError, match=r"Qwen/Qwen3-0\.6B: no other\.gguf in it"):
            open_remote(NAME, "other.gguf")
