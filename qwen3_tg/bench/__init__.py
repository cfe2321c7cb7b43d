"""`qwen3 bench`: speed, time to the first token, and what the memory could do."""
