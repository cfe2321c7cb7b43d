"""Check that llama.cpp reads the files of `qwen3 quantize` as we do, and rounds no better.

    python tools/check_llama_cpp.py --python LLAMA/bin/python [--types q8_0 q4_k_m ...]

LLAMA is a virtual environment with llama-cpp-python. Two small random models, one with experts, are
quantised to each type by our command. For each file, llama.cpp's logits are compared with those of
the numpy reference on the same file; our rounding error with that of llama.cpp's own quantiser from
the same weights; the types of the mixes with its choice. A third file has the real tokenizer, and
the tokens of a few texts are compared. llama.cpp rounds activations to 8 bits before it multiplies
them with quantised weights, so only F32 files can agree closely; there the best two of six experts
are used. Elsewhere all six are: in a random model the choice hangs on such a rounding.
Exits 1 where a bound is crossed.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "tests")]

import gguf  # noqa: E402
import qwen3_tg_numpy  # noqa: E402
from format_writers import random_model, write_float  # noqa: E402

from qwen3_tg.checkpoint.locate import TINY  # noqa: E402
from qwen3_tg.quantize.types import CHOICES, MIXES  # noqa: E402

DATA = ROOT / "tests" / "data"
LAYERS = 4  # of which the mixes give two more bits than the others
IDS_SEED, IDS_COUNT = 7, 24
TEXTS = [
    "Hello, world! It's 12:30.\n\n  def f(x):\n\treturn x**2",
    "Größe, ça va? 日本語のテキスト — नमस्ते 🙂🙃",
    "<|im_start|>user\nWhat is 37 + 85?<|im_end|>\n<think>\n\n</think>",
    "   many    spaces \r\n and 1234567890 numbers, DON'T we'll",
]
# Root of the mean square of the differences of logits, over their standard deviation. llama.cpp
# rounds activations to what it multiplies with: not for F32, to 16 bits for F16 and BF16, to 8 bits
# for all others, which a random model blows up. Measured: at most 3e-6, 0.002, 0.013 and 0.073.
BOUNDS = {"f32": 1e-4, "f16": 0.01, "bf16": 0.06}
QUANTISED_BOUND = 0.15
WORST_ERROR = 1.05  # ours against llama.cpp's, relative RMS of all weights


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantised files with llama.cpp.")
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter that has llama-cpp-python"
    )
    parser.add_argument("--types", nargs="*", default=list(CHOICES), choices=CHOICES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        failures = check_tokens(Path(folder) / "tokens", args.python)
        for moe in (False, True):
            failures += check(Path(folder) / str(moe), moe, args.types, args.python)
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(bool(failures))


def check(folder: Path, moe: bool, types: list[str], python: str) -> list[str]:
    """Print a table for one model; what is outside the bounds."""
    model = "experts" if moe else "dense"
    make_model(folder / "two", TINY, 800, moe=moe, tied=moe)
    everyone = {"num_experts_per_tok": 6} if moe else {}
    make_model(folder / "all", TINY, 800, moe=moe, tied=moe, **everyone)
    types = [*dict.fromkeys(["f32", *types])]
    ours = {type: folder / f"{type}.gguf" for type in types}
    errors = {
        type: quantise(folder / ("two" if type == "f32" else "all"), path, type)
        for type, path in ours.items()
    }
    theirs = {type: folder / f"{type}-llama.gguf" for type in types if type not in BOUNDS}
    ids = np.random.default_rng(IDS_SEED).integers(0, 768, IDS_COUNT).tolist()
    jobs = [
        {
            "source": str(ours["f32"]),
            "out": str(path),
            "file_type": CHOICES[type][1],
            "pure": type not in MIXES,
        }
        for type, path in theirs.items()
    ]
    models = {type: str(path) for type, path in ours.items()}
    found = ask_llama_cpp(folder, python, quantise=jobs, models=models, ids=ids)
    print(f"\n{model}")
    print("type       logits   at most   argmax   top 5   weight error, ours   llama.cpp's")
    failures = []
    reference = tensors(ours["f32"])
    for type, path in ours.items():
        failures += compare(type, path, ids, found[type])
        line = f"{errors[type]:>18.3%}"
        if type in theirs:
            mine, own = tensors(path), tensors(theirs[type])
            same = [name for name in mine if mine[name].tensor_type == own[name].tensor_type]
            if type in MIXES and len(same) < len(mine):
                failures.append(f"{type}: {sorted(set(mine) - set(same))} has another type")
            mine_error, own_error = (relative_error(kept, reference, same) for kept in (mine, own))
            line += f"   {own_error:>11.3%} ({mine_error / own_error - 1:+.1%} on the same tensors)"
            if mine_error > own_error * WORST_ERROR:
                failures.append(f"{type}: error {mine_error:.4f}, llama.cpp's {own_error:.4f}")
        print(line, flush=True)
    return [f"{model}: {failure}" for failure in failures]


def check_tokens(folder: Path, python: str) -> list[str]:
    """Print the versions and whether tokens agree; the texts where they do not."""
    from tokenizers import Tokenizer

    real = folder / "real"
    real.mkdir(parents=True)
    with lzma.open(DATA / "tokenizer.json.xz") as file:
        (real / "tokenizer.json").write_bytes(file.read())
    shutil.copy(DATA / "chat_template.jinja", real)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (real / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    make_model(folder / "model", real, 151936, num_hidden_layers=1, tied=True)
    quantise(folder / "model", folder / "model.gguf", "q8_0")
    found = ask_llama_cpp(folder, python, tokenizer=str(folder / "model.gguf"), texts=TEXTS)
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    wrong = [
        text
        for i, text in enumerate(TEXTS)
        if tokenizer.encode(text, add_special_tokens=False).ids != found[f"tokens_{i}"].tolist()
    ]
    print(
        f"llama-cpp-python {found['version']}, gguf {version('gguf')}, numpy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"tokens of {len(TEXTS) - len(wrong)} of {len(TEXTS)} texts agree")
    return [f"tokens of {text!r} differ" for text in wrong]


def ask_llama_cpp(folder: Path, python: str, **request: Any) -> dict[str, np.ndarray]:
    """What llama_cpp_worker.py finds."""
    empty = {"quantise": [], "models": {}, "ids": [], "tokenizer": None, "texts": []}
    (folder / "request.json").write_text(json.dumps(empty | request), encoding="utf-8")
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    command = [python, worker, folder / "request.json", folder / "found.npz"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr[-2000:])
    with np.load(folder / "found.npz") as file:
        return dict(file)


def make_model(folder: Path, texts: Path, vocab_size: int, **more: Any) -> None:
    """A random model with the tokenizer and chat template of another folder."""
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 512} | more
    config, weights = random_model(vocab_size=vocab_size, **sizes)
    write_float(folder, config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(texts / name, folder)


def quantise(model: Path, out: Path, type: str) -> float:
    """Run our command; the relative error of all weights."""
    command = [sys.executable, "-m", "qwen3_tg", "quantize", model, out, "--type", type, "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(json.loads(run.stdout)["error"])


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def relative_error(
    kept: dict[str, gguf.ReaderTensor], reference: dict[str, gguf.ReaderTensor], names: list[str]
) -> float:
    """Of the matrices among these tensors: root of mean square, relative."""
    changes = squares = 0.0
    for name in names:
        if kept[name].tensor_type == reference[name].tensor_type:
            continue
        x = reference[name].data
        change = gguf.quants.dequantize(kept[name].data, kept[name].tensor_type) - x
        changes += float(np.square(change, dtype=np.float64).sum())
        squares += float(np.square(x, dtype=np.float64).sum())
    return (changes / squares) ** 0.5


def compare(type: str, path: Path, ids: list[int], found: np.ndarray) -> list[str]:
    expected = qwen3_tg_numpy.load(path).logits(ids)
    difference = (found - expected) / expected.std()
    error, most = float(np.sqrt(np.square(difference).mean())), float(np.abs(difference).max())
    argmax = (found.argmax(-1) == expected.argmax(-1)).mean()
    top = [
        len(set(a) & set(b)) / 5
        for a, b in zip(
            np.argsort(found)[:, -5:].tolist(), np.argsort(expected)[:, -5:].tolist(), strict=True
        )
    ]
    print(f"{type:<8} {error:>9.1e} {most:>9.1e} {argmax:>8.0%} {np.mean(top):>7.0%}   ", end="")
    bound = BOUNDS.get(type, QUANTISED_BOUND)
    return [f"{type}: logits differ by {error:.3g} of their spread"] if error > bound else []


if __name__ == "__main__":
    main()
