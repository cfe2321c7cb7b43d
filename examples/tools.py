"""A model that calls a function: it asks, we compute, it answers with the result.

python examples/tools.py [MODEL]
"""

import sys

import qwen3_tg
from qwen3_tg import Text, ToolCall

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate a math expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "e.g. 2 + 3"}},
            "required": ["expression"],
        },
    },
}


def calculate(expression: str) -> int:
    """Two numbers and a sign between them; never eval() what a model wrote."""
    left, sign, right = expression.split()
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


llm = qwen3_tg.load(sys.argv[1] if len(sys.argv) > 1 else "tiny")
messages = [{"role": "user", "content": "What is 123 * 45?"}]
while True:
    text = ""
    calls = []
    for piece in llm.chat(messages, tools=[CALCULATOR]):
        if isinstance(piece, ToolCall):
            calls.append(piece)
        elif isinstance(piece, Text):
            text += piece.text
    if not calls:
        break
    asked = [{"function": {"name": c.name, "arguments": c.arguments}} for c in calls]
    messages.append({"role": "assistant", "content": text, "tool_calls": asked})
    for call in calls:
        result = calculate(**call.arguments)
        print(f"{call.name}({call.arguments['expression']!r}) = {result}")
        messages.append({"role": "tool", "content": str(result)})
print(text)
