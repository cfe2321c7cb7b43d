"""How many tokens to guess ahead, and whether guessing pays at all: by times measured on the way.

A guess costs a verification, which takes longer than a single step, and is worth the tokens that
were right. Guesses get longer while all are right and shorter while few are. Where a token takes
longer with guesses than without, guessing rests, for longer each time, and is then tried again.
Knows nothing of models: it is told seconds and counts.
"""

from __future__ import annotations

# Tokens guessed: with the one before them 2, 4 or 8 positions are computed at once.
LENGTHS = (1, 3, 7)
# Positions of a step that looks at guesses: one width, so that there is one graph. Up to so many,
# each is computed as it would be alone.
FEW = LENGTHS[-1] + 1
_FIRST = 1  # of LENGTHS
_KEPT = 0.8  # what an earlier measurement still counts when a new one comes
_TRY = 4  # rounds of guessing before they are judged
_BEGIN = 2  # single steps measured before the first guess
_REST, _LONGEST_REST = 16, 512  # single steps after guesses that lost; each time twice as many
_AGAIN = 64  # rounds after which a single step is measured again: it takes longer as text grows


class Pace:
    """Ask `length`, then say what came of it: `single`, or `round`."""

    def __init__(self) -> None:
        self._at = _FIRST
        self._single_s = 0.0  # mean, later ones counting more
        self._round_s = self._round_tokens = 0.0
        self._tried = self._since_single = 0
        self._resting, self._rest = _BEGIN, _REST

    @property
    def length(self) -> int:
        """Tokens to guess now; 0 is none."""
        if self._resting > 0 or self._since_single >= _AGAIN:
            return 0
        return LENGTHS[self._at]

    @property
    def single_s(self) -> float:
        """Seconds that a token takes alone; 0 where none was measured."""
        return self._single_s

    def single(self, seconds: float) -> None:
        """A step without a guess."""
        before = self._single_s
        self._single_s = before * _KEPT + seconds * (1 - _KEPT) if before else seconds
        self._since_single = 0
        self._resting = max(0, self._resting - 1)

    def round(self, guessed: int, right: int, seconds: float | None) -> None:
        """A step with so many guesses, of which the first `right` ones were; with the token that
        the step is for it gave one more. `seconds` None: not to be judged by its time."""
        if right == guessed:
            self._at = min(self._at + 1, len(LENGTHS) - 1)
        elif right * 2 < guessed:
            self._at = max(self._at - 1, 0)
        if seconds is None:
            return
        self._round_s = self._round_s * _KEPT + seconds
        self._round_tokens = self._round_tokens * _KEPT + right + 1
        self._tried += 1
        self._since_single += 1
        if self._tried < _TRY or not self._single_s:
            return
        if self._round_s <= self._single_s * self._round_tokens:
            self._rest = _REST
            return
        self._resting, self._rest = self._rest, min(self._rest * 2, _LONGEST_REST)
        self._at, self._tried, self._round_s, self._round_tokens = _FIRST, 0, 0.0, 0.0
