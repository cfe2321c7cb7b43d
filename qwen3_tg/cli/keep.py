"""Which file a conversation is kept in, and when; what is computed of it goes beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen3_tg.cli import session, settings, terminal
from qwen3_tg.cli.computed import ComputedFile
from qwen3_tg.cli.conversation import Conversation, count
from qwen3_tg.cli.session import Session
from qwen3_tg.errors import UsageError


class Keeper:
    """Saves and loads a conversation. `always`: after every change, to the file it has."""

    def __init__(self, conversation: Conversation, model: str):
        self._talk, self._model = conversation, model
        self._config = session.fingerprint(conversation.llm.config)
        self._computed = ComputedFile(conversation)
        self._path: Path | None = None
        self._always = False
        self._kept = self._now()

    def start(self, name: str) -> None:
        """For --session: load the file if it is there, and keep it up to date from now on. What
        the command line says goes before what the file says. Raises UsageError."""
        path, options = _path(name), self._talk.options
        said = settings.given(options) | ({"system": options.system} if options.system else {})
        if _exists(path):
            self._take(session.read(path), path)
            self._computed.load(path)
            for setting, value in said.items():
                setattr(options, setting, value)
        else:
            self._computed.check(path)
            terminal.note(f"(the conversation is kept in {path})")
        self._path, self._always, self._kept = path, True, self._now()
        session.write(path, self._kept)  # an unwritable place is found now, not after an answer

    def after_a_turn(self) -> None:
        """To call after whatever may have changed the conversation."""
        now = self._now()
        if self._always and self._path and now != self._kept:
            session.write(self._path, now)
            self._kept = now

    def leave(self) -> None:
        """To call when the conversation that is kept is left."""
        if self._always and self._path:
            self._computed.save(self._path)

    def save(self, name: str, force: bool = False) -> tuple[Path, int]:
        """Write to this file, or with no name to the one it was saved to or loaded from before.
        Gives it, and the tokens of which what is computed was written, too.

        Raises UsageError, also where another file would be lost."""
        if not name and self._path is None:
            raise UsageError("/save takes a file to write")
        path = _path(name) if name else self._path
        assert path is not None
        if path != self._path and not force:
            for file in (path, self._computed.beside(path)):
                if file and _exists(file):
                    raise UsageError(
                        f"{file}: there is such a file; to write over it: /save --force FILE"
                    )
        session.write(path, self._now())
        if not self._always:
            self._path = path
        return path, self._computed.save(path)

    def load(self, name: str) -> None:
        """Go on with what the file holds. What --session keeps up to date is this file then."""
        path = _path(name)
        self.after_a_turn()
        found = session.read(path)
        self.leave()
        former, before = self._path, self._now()

        def restore() -> None:
            """All that was taken from the file but the messages, and which file is kept."""
            self._path = former
            self._set(before)
            self._kept = self._now()  # not written: the former file has it

        self._take(found, path, restore)
        self._computed.load(path)
        self._path, self._kept = path, self._now()

    def _take(self, found: Session, path: Path, restore: Callable[[], None] | None = None) -> None:
        talk = self._talk
        if found.config != self._config:
            terminal.note(
                f"note: {path} was had with {found.model}, another model; {self._model} goes on"
            )
        self._set(found)
        talk.replace_messages(list(found.messages), restore)
        system = ", a system message" if found.system else ""
        chosen = ", ".join(f"{name} {value}" for name, value in found.settings.items())
        terminal.note(f"({count(found.messages)} from {path}{system}{chosen and ', ' + chosen})")
        if question := talk.question():
            text = " ".join(question.text.split())
            terminal.note(f"(the last question: {text if len(text) < 60 else text[:59] + '…'})")

    def _set(self, found: Session) -> None:
        options = self._talk.options
        for name in (*settings.RANGES, "thinking"):
            setattr(options, name, found.settings.get(name))
        options.system, self._talk.draws = found.system, found.draws

    def _now(self) -> Session:
        talk = self._talk
        return Session(
            self._model,
            self._config,
            talk.options.system or None,
            talk.messages,
            settings.given(talk.options),
            talk.draws,
        )


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"{name}: there is no such user's folder") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:  # a folder that one may not look into
        raise UsageError(f"{path}: {e.strerror or e}") from None
