"""A model that calls Python functions: what they take is read from their signatures and docstrings.

python examples/tools.py [MODEL [QUESTION]]

The embedded model only calls the calculator. A real one also answers
"What does chat.py print? Read it."
"""

import sys
from pathlib import Path

import qwen3_tg
from qwen3_tg import Text, ToolCall, ToolResult

FOLDER = Path(__file__).resolve().parent


def calculator(expression: str) -> int:
    """Evaluate a math expression.

    Args:
        expression: e.g. 2 + 3
    """
    # two numbers and a sign between them; never eval() what a model wrote
    left, sign, right = expression.split()
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def read_file(path: str) -> str:
    """Read a file of this folder.

    Args:
        path: its name, e.g. chat.py
    """
    file = (FOLDER / path).resolve()
    if file.parent != FOLDER:  # a model may be talked into asking for any file
        raise qwen3_tg.ToolError(f"{path} is not in this folder")
    return file.read_text(encoding="utf-8")


llm = qwen3_tg.load(sys.argv[1] if len(sys.argv) > 1 else "tiny")
question = sys.argv[2] if len(sys.argv) > 2 else "What is 123 * 45?"
loop = llm.chat_with_tools([{"role": "user", "content": question}], [calculator, read_file])
for piece in loop:
    match piece:
        case ToolCall(name, arguments):
            print(f"{name}({', '.join(map(repr, arguments.values()))})", end="")
        case ToolResult(content=content):
            print(f" = {content}")
        case Text(text):
            print(text, end="", flush=True)
print()
for message in loop.messages:  # the conversation, to go on with
    print(message)
