"""Which file a conversation is kept in, and when; what is computed of it goes beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
        self._written: tuple[int, int] | None = None  # the stamp of the file as we left it

    def start(self, name: str) -> None:
        """For --session: load the file if it is there, and keep it up to date from now on. What
        the command line says goes before what the file says. Raises UsageError."""
        path, options = _path(name), self._talk.options
        is_new = not _exists(path)
        if is_new:
            self._computed.check(path)
        else:
            found = session.read(path)
            chosen = {**found.settings, **settings.given(options)}
            found = replace(found, system=options.system or found.system, settings=chosen)
            self._take(found, path)
            self._computed.load(path)
        self._path, self._always = path, True
        self._write(path)  # an unwritable place is found now, not after an answer
        if is_new:
            terminal.note(f"(the conversation is kept in {path})")

    @property
    def kept_in(self) -> Path | None:
        """The file that every change goes to, if there is one."""
        return self._path if self._always else None

    def after_a_turn(self) -> None:
        """To call after whatever may have changed the conversation."""
        if not self._always or not self._path or self._now() == self._kept:
            return
        if _stamp(self._path) != self._written:
            terminal.note(
                f"note: another program has changed {self._path}: this conversation is no longer "
                "kept there; /save FILE keeps it elsewhere"
            )
            self._always, self._path = False, None
            return
        self._write(self._path)

    def _write(self, path: Path) -> None:
        now = self._now()
        session.write(path, now)
        self._kept, self._written = now, _stamp(path)

    def leave(self) -> None:
        """To call when the conversation that is kept is left."""
        if self._always and self._path and _stamp(self._path) == self._written:
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
        if path == self._path and not force and _stamp(path) != self._written:
            raise UsageError(
                f"{path}: another program has changed it; to write over it: /save --force FILE"
            )
        if path == self._path or not self._always:
            self._path = path
            self._write(path)
        else:
            session.write(path, self._now())
        return path, self._computed.save(path)

    def load(self, name: str) -> None:
        """Go on with what the file holds. What --session keeps up to date is this file then."""
        path = _path(name)
        self.after_a_turn()
        found = session.read(path)
        self.leave()
        former, before, stamp = self._path, self._now(), self._written

        def restore() -> None:
            """All that was taken from the file but the messages, and which file is kept."""
            self._path, self._written = former, stamp
            self._set(before)
            self._kept = self._now()  # not written: the former file has it

        self._take(found, path, restore)
        self._computed.load(path)
        self._path, self._kept, self._written = path, self._now(), _stamp(path)
        if self._always and path != former:
            terminal.note(f"(from now on it is kept there, and {former} stays as it is)")

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


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written, as that replaces it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:  # a folder that one may not look into
        raise UsageError(f"{path}: {e.strerror or e}") from None
