"""Float checkpoints to GGUF files with fewer bits, which llama.cpp loads too.

search.py finds the numbers of a block, blocks.py packs them, types.py says which tensor gets which
type, metadata.py what else the file says, writer.py writes it, perplexity.py measures a model.
No tinygrad here: making a file needs no device."""
