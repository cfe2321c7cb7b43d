"""Qwen3 on tinygrad: load a checkpoint, generate and chat, on whatever device there is.

    import qwen3_tg

    llm = qwen3_tg.load("tiny")
    for piece in llm.chat([{"role": "user", "content": "What is 37 + 85?"}]):
        print(piece)

Importing this is cheap: no tinygrad and no device until something is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen3_tg.errors import (
    ChatError,
    CheckpointError,
    ContextError,
    DeviceError,
    Qwen3Error,
    UnfinishedError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from qwen3_tg.config import ModelConfig
    from qwen3_tg.llm import LLM, load
    from qwen3_tg.reply import End, Text, Thinking, ToolCall
    from qwen3_tg.sampling import Sampling
    from qwen3_tg.structured import Constraint
    from qwen3_tg.tokenizer import Tokenizer
    from qwen3_tg.tool_loop import ToolLoop
    from qwen3_tg.tools import Tool, ToolError, ToolResult

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "load": "llm",
    "ModelConfig": "config",
    "Sampling": "sampling",
    "Tokenizer": "tokenizer",
    "Thinking": "reply",
    "Text": "reply",
    "ToolCall": "reply",
    "End": "reply",
    "Constraint": "structured",
    "Tool": "tools",
    "ToolError": "tools",
    "ToolResult": "tools",
    "ToolLoop": "tool_loop",
}

__all__ = [
    "LLM",
    "ChatError",
    "CheckpointError",
    "Constraint",
    "ContextError",
    "DeviceError",
    "End",
    "ModelConfig",
    "Qwen3Error",
    "Sampling",
    "Text",
    "Thinking",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolLoop",
    "ToolResult",
    "UnfinishedError",
    "UnsupportedError",
    "UsageError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
