"""A conversation of two turns: the model thinks, answers, and remembers.

python examples/chat.py [MODEL]
"""

import sys

import qwen3_tg
from qwen3_tg import End, Text, Thinking

llm = qwen3_tg.load(sys.argv[1] if len(sys.argv) > 1 else "tiny")
messages = []
for question in ("What is 37 + 85?", "now add 12"):
    messages.append({"role": "user", "content": question})
    print(f"> {question}")
    answer = ""
    for piece in llm.chat(messages):
        match piece:
            case Thinking(text):
                print(text, end="", flush=True)
            case Text(text):
                answer += text
            case End():
                print(f"\n= {answer}    ({piece.thinking_tokens} tokens of thinking)")
    messages.append({"role": "assistant", "content": answer})
