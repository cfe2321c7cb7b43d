"""Without a chat: text to ids, ids to logits, logits to the next id, by hand and by the library.

python examples/step_by_step.py [MODEL]
"""

import sys

import numpy as np

import qwen3_tg

llm = qwen3_tg.load(sys.argv[1] if len(sys.argv) > 1 else "tiny")
assert llm.tokenizer  # a checkpoint of ids alone has none
prompt = llm.render([{"role": "user", "content": "7 + 5"}], add_generation_prompt=True)
print(prompt)
ids = llm.tokenizer.encode(prompt)

# By hand: the most likely next token, ten times. Each call computes the whole text.
by_hand = list(ids)
for _ in range(10):
    logits = llm.logits(by_hand)  # (S, V): after every position; the last one says what comes next
    by_hand.append(int(np.argmax(logits[-1])))

# By the library: the same ids, from a cache of keys and values.
cached = list(llm.generate_ids(ids, max_new_tokens=10, stop_ids=()))
assert cached == by_hand[len(ids) :]
print(llm.tokenizer.decode(cached))
