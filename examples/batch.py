"""Many questions at once: the weights are read once for the next tokens of all of them.

python examples/batch.py [MODEL]
"""

import sys
import time

import qwen3_tg

llm = qwen3_tg.load(sys.argv[1] if len(sys.argv) > 1 else "tiny")
questions = [f"What is {n} + {9 * n}?" for n in range(1, 25)]
conversations = [[{"role": "user", "content": question}] for question in questions]

began = time.perf_counter()
batch = llm.batch(size=8)
for answer in batch.answers(conversations, sampling=qwen3_tg.Sampling(temperature=0)):
    # in the order in which they end; what went wrong with one would be in answer.error
    print(questions[answer.number], answer.text)
seconds = time.perf_counter() - began
print(
    f"{batch.new_tokens} tokens in {batch.steps} steps, {batch.new_tokens / seconds:.0f} tokens/s"
)
