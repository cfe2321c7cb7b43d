"""Text to ids and back, through the checkpoint's tokenizer.json and the `tokenizers` library.

Adds two things of its own: text in which special tokens stay plain text, and decoding token by
token that never gives half a character. Knows nothing of messages and templates.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from qwen3_tg.errors import CheckpointError, UsageError


class Tokenizer:
    """`source` is the path of a tokenizer.json, or its text; `where` then names what it is from.

    Raises CheckpointError if it is damaged or of another kind."""

    def __init__(self, source: Path | str, where: str = "the checkpoint's tokenizer"):
        where = str(source) if isinstance(source, Path) else where
        try:
            self._json = source if isinstance(source, str) else source.read_text(encoding="utf-8")
            self._tokenizer = HFTokenizer.from_str(self._json)
        except Exception as e:  # the library raises plain Exception
            raise CheckpointError(f"{where}: not a readable tokenizer: {e}") from None
        if '"ByteLevel"' not in self._json:
            raise CheckpointError(f"{where}: not a byte-level tokenizer, which every Qwen3 has")
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: id for id, token in added.items()}
        self._special_ids = frozenset(id for id, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; the model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def has_ids_from(self, limit: int) -> bool:
        """Whether an id of `limit` or more has a token. Unlike `size`, which lists them all, it
        looks a few thousand ids ahead, which no tokenizer leaves out."""
        if self.vocab_size > limit or any(id >= limit for id in self.added_tokens.values()):
            return True
        ahead = range(limit, limit + 4096)
        return any(self._tokenizer.id_to_token(id) is not None for id in ahead)

    def first_difference(self, other: Tokenizer) -> int | None:
        """The lowest id that means another token there. Ids that only one of them has do not count:
        where a vocabulary is filled up, some checkpoints name what fills it."""
        if self._json == other._json:
            return None
        theirs = {id: token for token, id in other._tokenizer.get_vocab().items()}
        ours = self._tokenizer.get_vocab().items()
        return min((id for token, id in ours if theirs.get(id, token) != token), default=None)

    def encode(self, text: str, plain: bool = False) -> list[int]:
        """Ids of a text, none added around it. Special tokens in the text act as such, unless
        `plain`, where `<|im_end|>` is nothing but ten characters. Raises UsageError for a text that
        is not valid Unicode."""
        tokenizer = self._plain if plain else self._tokenizer
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError("the text holds half a surrogate pair: it is not valid Unicode")
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, ids without a token give nothing.
        `skip_special` drops the tokens flagged special, which <think> and <tool_call> are not."""
        known = [id for id in ids if 0 <= id < 2**32]  # the library's own type
        return self._tokenizer.decode(known, skip_special_tokens=skip_special)

    def stream(self) -> StreamDecoder:
        """A fresh decoder for one token at a time."""
        return StreamDecoder(self)

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for: its UTF-8 bytes, whole characters or not; b"" for no token."""
        token = self._tokenizer.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        return bytes(_BYTE_OF[letter] for letter in token)

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        """Matches any added token in a text, the longest first."""
        tokens = sorted(self.added_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    @cached_property
    def _plain(self) -> HFTokenizer:
        # a second tokenizer without added tokens: the library's own switch spares only those
        # flagged special
        return HFTokenizer.from_str(json.dumps(json.loads(self._json) | {"added_tokens": []}))


class StreamDecoder:
    """Ids in, one by one; text out as soon as it is certain."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that became certain with this token; "" while a character is unfinished."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet of byte-level BPE: printable bytes are their own letter, the others take the
    letters from U+0100 on in order (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_letters()
