"""What llama.cpp makes of GGUF files; check_llama_cpp.py starts it in an interpreter that has
llama-cpp-python and numpy, and nothing of this project.

    python llama_cpp_worker.py REQUEST.json OUT.npz

The request: {"quantise": [{"source", "out", "file_type", "pure"}], "models": {name: path},
"ids": [...], "tokenizer": path or null, "texts": [...]}. OUT has the logits of each model after
each id, by its name; the tokens that the file `tokenizer` makes of each text as tokens_0, tokens_1
...; and the version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def quantise(source: str, out: str, file_type: int, pure: bool) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = file_type, pure, 2
    code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize gave {code} for {source}")


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in request["quantise"]:
        quantise(**job)
    found: dict[str, np.ndarray] = {"version": np.array(llama_cpp.__version__)}
    ids = request["ids"]
    for name, path in request["models"].items():
        llm = llama_cpp.Llama(
            path,
            n_ctx=len(ids),
            logits_all=True,
            n_threads=2,
            type_k=llama_cpp.GGML_TYPE_F32,  # by default keys and values are rounded to 16 bits
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        llm.eval(ids)
        found[name] = np.array(llm.scores[: len(ids)], dtype=np.float32)
        llm.close()
    if request["tokenizer"]:
        llm = llama_cpp.Llama(request["tokenizer"], vocab_only=True, verbose=False)
        for i, text in enumerate(request["texts"]):
            tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
            found[f"tokens_{i}"] = np.array(tokens)
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
