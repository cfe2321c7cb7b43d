"""The errors a user can cause or meet. Each message says what was found, what was expected, where,
and what to do; the command line prints it as one `error:` line."""

from numbers import Integral


class Qwen3Error(Exception):
    """Base of every error this package raises on purpose."""


class UsageError(Qwen3Error):
    """The call itself is wrong: an option, an empty prompt, an argument out of range."""


class CheckpointError(Qwen3Error):
    """The model's files are missing, damaged or do not fit together."""


class UnsupportedError(CheckpointError):
    """The checkpoint is whole but needs something this version does not compute."""


class DeviceError(Qwen3Error):
    """The device, its driver or its compiler is missing or does not work."""


class ContextError(Qwen3Error):
    """The tokens do not fit in the context."""


class ChatError(Qwen3Error):
    """The messages cannot be rendered with the checkpoint's chat template."""


class UnfinishedError(Qwen3Error):
    """The answer is not of the form that was asked for, because it was cut or cannot be made."""


def check_count(name: str, value: int | None, least: int) -> None:
    """Raises UsageError for what is neither None nor an integer from `least` on."""
    if value is not None and (not isinstance(value, Integral) or value < least):
        raise UsageError(f"{name} must be at least {least} and an integer, found {value!r}")
