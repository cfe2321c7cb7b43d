"""Qwen3 on tinygrad: load a checkpoint, generate and chat, on whatever device there is.

    import qwen3_tg

    llm = qwen3_tg.load("tiny")
    for piece in llm.chat([{"role": "user", "content": "What is 37 + 85?"}]):
        print(piece)

What there is (help(qwen3_tg.LLM) and so on says more):

    load         a checkpoint; gives an LLM
    LLM          chat, chat_with_tools, generate, completion, batch; ids and logits; render, fit
    Sampling     how tokens are chosen: temperature, top_p, seed and so on
    Constraint   the form of an answer: a JSON schema, a regular expression or a grammar
    Thinking, Text, ToolCall, End
                 the pieces of a reply, End the last of them
    Tool, ToolResult, ToolError, ToolLoop
                 a function that the model may call, what a call gave, and the loop of both
    Batch, Request, Answer
                 many conversations at once, one of them, and what became of it
    Generation, Slots
                 the same for ids: those that follow a prompt, and many sequences at once
    ModelConfig, Tokenizer
                 the shape of a model, and its text to ids and back
    Qwen3Error   the base of every error that is raised on purpose

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
    from qwen3_tg.batch import Answer, Batch, Request
    from qwen3_tg.config import ModelConfig
    from qwen3_tg.generate import Generation as Generation
    from qwen3_tg.llm import LLM, load
    from qwen3_tg.reply import End, Text, Thinking, ToolCall
    from qwen3_tg.sampling import Sampling
    from qwen3_tg.slots import Slots as Slots
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
    "Answer": "batch",
    "Batch": "batch",
    "Request": "batch",
}
# These need tinygrad. `import *`, help() and completion at a prompt look at all of __all__, so they
# are not in it.
_HOME_WITH_TINYGRAD = {"Generation": "generate", "Slots": "slots"}

__all__ = [
    "LLM",
    "Answer",
    "Batch",
    "ChatError",
    "CheckpointError",
    "Constraint",
    "ContextError",
    "DeviceError",
    "End",
    "ModelConfig",
    "Qwen3Error",
    "Request",
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


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME_WITH_TINYGRAD:
        from qwen3_tg.compiler import prepare_environment

        prepare_environment()  # tinygrad reads some of it when it is imported
    home = (_HOME | _HOME_WITH_TINYGRAD).get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
