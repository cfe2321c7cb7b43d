"""End a stream of text at a stop string, which may come in parts, and never let its start out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from qwen3_tg.errors import UsageError


def unfinished(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the start of one of `words`."""
    longest = 0
    for word in words:
        for n in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:n]):
                longest = n
                break
    return longest


class StopStrings:
    """Text in, text out up to the first of `strings`; `found` says whether one came."""

    def __init__(self, strings: Sequence[str]):
        is_list = isinstance(strings, Collection) and not isinstance(strings, str)
        if not is_list or not all(isinstance(s, str) and s for s in strings):
            raise UsageError(f"stop strings must be a list of texts, none empty, found {strings!r}")
        self._strings, self._held, self.found = tuple(strings), "", False

    def push(self, text: str) -> str:
        """What is certain to come before any stop string."""
        if self.found:
            return ""
        text = self._held + text
        # whichever is complete first, as if the text had come letter by letter
        ends = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        certain = len(text) - unfinished(text, self._strings)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back in case it became a stop string."""
        held, self._held = self._held, ""
        return held
