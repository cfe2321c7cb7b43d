"""The hub over HTTP: which files a model has, and their bytes from any place on.

The listing comes from huggingface_hub's API, the bytes through its HTTP session (its endpoint,
token, proxies and certificates). Its own download is not used: it checks no sums, and in some
versions it starts again after a cut. Knows nothing of the cache and of what is in the files.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen3_tg.errors import CheckpointError

# Pauses before the next try when nothing has come since the last one.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
LONGEST_PAUSE_S = 120.0  # that a server may ask for
_GOOD_PIECE_BYTES = 1 << 20
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_PERMANENT = ("UnsupportedProtocol", "LocalProtocolError", "TooManyRedirects", "InvalidURL")
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError")
_SIZES = "0.6B 1.7B 4B 8B 14B 32B 30B-A3B 235B-A22B".split()
_RELEASES_2507 = [
    f"Qwen3-{size}-{kind}-2507"
    for size in ("4B", "30B-A3B", "235B-A22B")
    for kind in ("Instruct", "Thinking")
]
FAMILY = tuple(
    f"Qwen/{name}"
    for name in (
        *(f"Qwen3-{size}{variant}" for size in _SIZES for variant in ("", "-FP8", "-GGUF")),
        *(f"Qwen3-{size}-Base" for size in _SIZES if size not in ("32B", "235B-A22B")),
        *(f"Qwen3-{size}-AWQ" for size in ("4B", "8B", "14B", "32B")),
        *(f"Qwen3-{size}-GPTQ-Int8" for size in ("0.6B", "1.7B")),
        *(f"Qwen3-{size}-GPTQ-Int4" for size in ("30B-A3B", "235B-A22B")),
        *(f"{name}{variant}" for name in _RELEASES_2507 for variant in ("", "-FP8")),
    )
)


class NotOnHub(CheckpointError):
    """There is no such model, or it is not shown to this user."""


class Interrupted(Exception):
    """A try failed that may work the next time: after `pause_s`, where the server says so."""

    def __init__(self, what: str, pause_s: float | None = None, unreachable: bool = False):
        super().__init__(what)
        self.pause_s, self.unreachable = pause_s, unreachable


class Misled(Exception):
    """The server sends something else than what it announced."""


@dataclass(frozen=True)
class HubFile:
    """A file of a model: its size, and the sum that its content must have: the sha256 of a large
    file (LFS), the sha1 of git's blob of a small one."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def etag(self) -> str:
        """The name of its content in the cache of huggingface_hub."""
        return self.sha256 or self.blob_id or ""


@dataclass(frozen=True)
class Listing:
    """The files of a model at one commit."""

    name: str
    commit: str
    files: Mapping[str, HubFile]


def full_name(typed: str) -> str:
    """A bare name means one of Qwen's. Those are found whatever the capitals, and as ollama names
    them: qwen3:8b."""
    whole = typed if "/" in typed else f"Qwen/{typed}"
    known = {name.lower(): name for name in FAMILY}
    return known.get(whole.lower().replace("/qwen3:", "/qwen3-"), whole)


def near_names(name: str) -> list[str]:
    """Names of Qwen3 models that look like this one."""
    by_model = {known.partition("/")[2].lower(): known for known in FAMILY}
    found = difflib.get_close_matches(name.rpartition("/")[2].lower(), by_model, n=3, cutoff=0.75)
    return [by_model[match] for match in found if by_model[match] != name]


def list_files(
    typed: str, revision: str | None = None, note: Callable[[str], None] | None = None
) -> Listing:
    """What the hub has under a name. `note` is told of each pause before another try.

    Raises NotOnHub, and CheckpointError for everything else: one line that says what to do."""
    from huggingface_hub import HfApi, constants

    name = full_name(typed)
    tries = Tries(note)
    while True:
        try:
            with _translated(name, revision):
                info = HfApi().model_info(
                    name,
                    revision=revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            return _listing(name, info)
        except Interrupted as e:
            tries.wait(e)


@dataclass(frozen=True)
class Body:
    """The bytes of a file from `start` to before `end`: all of them, whatever was asked for, where
    the server ignores ranges."""

    start: int
    end: int
    chunks: Iterator[bytes]


@contextmanager
def open_file(
    listing: Listing, file: HubFile, start: int = 0, end: int | None = None
) -> Iterator[Body]:
    """Ask for the bytes of a file from `start` to before `end`.

    Raises, also while they are read: Interrupted, Misled where lengths contradict the listing, and
    CheckpointError."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = start > 0 or (end is not None and end < file.size)
    # the length of a compressed answer would tell nothing, and it cannot be continued
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if part:
        headers["Range"] = f"bytes={start}-{end - 1 if end is not None else ''}"
    url = hf_hub_url(listing.name, file.name, revision=listing.commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with (
        _translated(listing.name, None, file.name),
        get_session().stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as response,
    ):
        if response.status_code >= 400:
            _raise_for_status(response, listing.name, file.name)
        yield Body(*_check_length(response, file, start), response.iter_raw())


class Tries:
    """Counts tries that failed, and waits before the next one. `reached` once the hub answered: as
    long as it never has, this machine is most likely offline, and one more try is enough."""

    def __init__(self, note: Callable[[str], None] | None = None, reached: bool = False):
        self._note, self._reached, self._failed, self._came_bytes = note, reached, 0, 0

    def came(self, count: int) -> None:
        """So many bytes have come; after a good piece of them, the tries are counted anew."""
        self._came_bytes += count
        if self._came_bytes >= _GOOD_PIECE_BYTES:
            self._failed = 0

    def wait(self, why: Interrupted) -> None:
        """Raises CheckpointError when it has been tried often enough."""
        hopeless = why.unreachable and not self._reached
        if self._failed >= (1 if hopeless else len(PAUSES_S)):
            raise CheckpointError(
                f"{why}: is this machine online?"
                if hopeless
                else f"{why}, {self._failed + 1} times"
            ) from why.__cause__
        pause_s = PAUSES_S[self._failed] if why.pause_s is None else why.pause_s
        if pause_s > LONGEST_PAUSE_S:
            raise CheckpointError(f"{why}; the server asks to come again in {pause_s:.0f} s")
        self._failed, self._came_bytes = self._failed + 1, 0
        if self._note:
            limit = 1 if hopeless else len(PAUSES_S)
            self._note(f"{why}; trying again in {pause_s:.0f} s ({self._failed} of {limit})")
        time.sleep(pause_s)


def _listing(name: str, info: Any) -> Listing:
    canonical = info.id if str(info.id).lower() == name.lower() else name
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)) or info.siblings is None:
        raise CheckpointError(f"{name}: the hub's answer has no commit or no files")
    files = {}
    for found in info.siblings:
        lfs = found.lfs
        size = lfs.size if lfs else found.size
        file = HubFile(found.rfilename, size, lfs.sha256 if lfs else None, found.blob_id)
        # Its name and sum become names on the disk, and a terminal shows them. No model needs a
        # file with a name such as this.
        parts = set(re.split(r"[/\\]", file.name))
        if {"", ".", ".."} & parts or ":" in file.name or not file.name.isprintable():
            continue
        right_sum = re.fullmatch("[0-9a-f]{64}" if file.sha256 else "[0-9a-f]{40}", file.etag)
        if not right_sum or not isinstance(size, int) or size < 0:
            raise CheckpointError(f"{name}: the hub tells no size or sum of {file.name}")
        files[file.name] = file
    return Listing(canonical, info.sha, files)


@contextmanager
def _translated(name: str, revision: str | None, file: str = "") -> Iterator[None]:
    """What huggingface_hub and its HTTP library raise, as Interrupted or CheckpointError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError:
        raise CheckpointError(f"{name!r} is no model name such as Qwen/Qwen3-0.6B") from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, which forbids asking the hub; "
            "unset it to fetch a model"
        ) from None
    except HfHubHTTPError as e:
        _raise_for_status(e.response, name, file, revision)
    except Exception as e:
        kind = type(e).__name__
        # the base of all errors of the library's HTTP client, which differs between its versions
        if not isinstance(e, HfHubHTTPError.__bases__[0]) and kind != "InvalidURL":
            if file or not isinstance(e, (ValueError, TypeError, KeyError, AttributeError)):
                raise
            raise CheckpointError(
                f"{constants.ENDPOINT} answers with something that is no list of a model's files"
            ) from e
        if kind in _PERMANENT:
            raise CheckpointError(f"cannot ask {constants.ENDPOINT}: {e}") from e
        if kind in _UNREACHABLE:
            reason = str(e) or "no answer"
            raise Interrupted(
                f"no connection to {constants.ENDPOINT} ({reason})", unreachable=True
            ) from e
        if "Timeout" in kind:
            raise Interrupted(
                f"nothing came from the hub for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s"
            ) from e
        raise Interrupted("the connection to the hub was cut") from e


def _raise_for_status(response: Any, name: str, file: str, revision: str | None = None) -> None:
    """Raises for a status of 400 and above, from the status and the hub's own error codes."""
    from huggingface_hub import constants

    status, code = response.status_code, response.headers.get("X-Error-Code")
    page = f"{constants.ENDPOINT}/{name}"
    what = f"{name}: {file}" if file else name
    if status in _TRANSIENT:
        busy = "too many requests for now" if status == 429 else "the hub is out of order for now"
        raise Interrupted(f"{busy} (HTTP {status})", _asked_pause_s(response))
    if code == "RevisionNotFound":
        raise CheckpointError(f"{name} has no revision {revision or 'main'!r}; see {page}/commits")
    if code == "GatedRepo":
        raise CheckpointError(
            f"{name} is gated: agree to its terms at {page}, then log in with: hf auth login "
            "(or set HF_TOKEN)"
        )
    if response.headers.get("X-Error-Message", "").startswith("Invalid credentials"):
        raise CheckpointError(
            "the hub does not know your token (HF_TOKEN, or hf auth login): renew or unset it"
        )
    # of a name that does not exist it says 401 to those who are not logged in
    if code == "RepoNotFound" or (status in (401, 404) and not file):
        near = near_names(name)
        raise NotOnHub(
            f"{name} is not on the hub"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
            + (" (if it is private: log in with hf auth login, or set HF_TOKEN)")
        )
    if status in (401, 403):
        raise CheckpointError(
            f"{what}: access refused (HTTP {status}); log in with hf auth login (or set HF_TOKEN), "
            f"and see {page}"
        )
    if status == 404:
        raise CheckpointError(f"{what}: not found on the hub (HTTP 404)")
    if status == 416:
        raise Misled(f"{what}: the server has fewer bytes than the hub announces")
    raise CheckpointError(f"{what}: the hub refuses (HTTP {status})")


def _asked_pause_s(response: Any) -> float | None:
    """The pause that the server asks for, by Retry-After or the draft of RateLimit headers."""
    if (after := response.headers.get("Retry-After", "").strip()).isdecimal():
        return float(after)
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
    return float(limit[1]) + 1 if limit else None


def _check_length(response: Any, file: HubFile, asked: int) -> tuple[int, int]:
    """Which bytes come; raises Misled if they are not those of the file, or others than asked."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Misled(f"{file.name}: the server sends it compressed, though asked not to")
    if response.status_code == 206:
        header = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header)
        if not match or int(match[1]) != asked:
            raise Misled(f"{file.name}: asked for bytes from {asked} on, got {header!r}")
        start, end, size = asked, int(match[2]) + 1, match[3]
    else:
        start, end, size = 0, file.size, response.headers.get("Content-Length", "*")
    if size.isdecimal() and int(size) != file.size:
        raise Misled(f"{file.name}: the server sends {size} bytes, the hub announces {file.size}")
    return start, end
