"""Train the tiny embedded model: its tokenizer, then the model, then write the checkpoint folder.

    python tools/train_tiny.py --qwen3-files DIR --out first
    python tools/train_tiny.py --qwen3-files DIR --init first --out second --stage 2 --seed 1 \\
        --steps 2000 --muon-lr 2e-3 --adam-lr 1e-3
    python tools/train_tiny.py --qwen3-files DIR --init second --out third --stage 3 --seed 2 \\
        --steps 1200 --muon-lr 2e-3 --adam-lr 1e-3
    python tools/train_tiny.py --qwen3-files DIR --init third --out fourth --stage 4 --seed 3 \\
        --steps 900 --muon-lr 2e-3 --adam-lr 1e-3

DIR holds the real tokenizer.json, tokenizer_config.json and chat_template.jinja of Qwen3. The
later lines go on from the checkpoint before, with its tokenizer and another mix of data. Needs
torch, transformers, tokenizers and safetensors, none of which qwen3_tg itself needs. Knows
nothing of qwen3_tg: transformers' Qwen3ForCausalLM is the model that is trained.
"""

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import tiny_data
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

BASE_TOKENS = 768
VOCAB_SIZE = 800  # 768 + 26 added tokens, and six rows without a token, as real Qwen3 has some
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
}


def prompts(cases: list[tiny_data.Case], template: str) -> list[str]:
    """The rendered prompt of every case, up to and with the generation prompt."""
    texts = []
    for case in cases:
        rendered, _ = render_jinja_template(
            [case.messages],
            tools=case.tools,
            chat_template=template,
            add_generation_prompt=True,
            enable_thinking=case.thinking,
        )
        texts.append(rendered[0])
    return texts


def train_tokenizer(texts: list[str], source: Path, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to `out`.

    Only vocabulary and merges are new; normalizer, split pattern, decoder and the 26 added tokens
    are those of `source`, with ids from BASE_TOKENS on.
    """
    real = json.loads((source / "tokenizer.json").read_text("utf-8"))
    split = real["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    pieces = []
    for text in texts:  # an added token never takes part in a merge
        for token in real["added_tokens"]:
            text = text.replace(token["content"], "\x00")
        pieces += text.split("\x00")
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(pieces, trainer)
    trained = json.loads(bpe.to_str())["model"]
    if len(trained["vocab"]) != BASE_TOKENS:
        raise SystemExit(f"error: {len(trained['vocab'])} base tokens, expected {BASE_TOKENS}")
    real["model"] |= {"vocab": trained["vocab"], "merges": trained["merges"]}
    first = real["added_tokens"][0]["id"]
    for token in real["added_tokens"]:
        token["id"] += BASE_TOKENS - first
    config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] = {
        str(int(i) + BASE_TOKENS - first): t for i, t in config["added_tokens_decoder"].items()
    }
    config["model_max_length"] = CONFIG["max_position_embeddings"]
    write_json(out / "tokenizer.json", real)
    write_json(out / "tokenizer_config.json", config)
    (out / "chat_template.jinja").write_bytes((source / "chat_template.jinja").read_bytes())


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def batches(rng: random.Random, count: int, tokens: int, make) -> list[list[tuple[list, int]]]:
    """`count` batches of about `tokens` tokens, each of examples of about the same length.

    `make(n)` gives n examples (ids, where the target starts). A pool is sorted by length, cut
    into batches and shuffled, so that lengths mix over time but hardly within a batch.
    """
    done: list = []
    while len(done) < count:
        pool = sorted(make(4000), key=lambda example: (len(example[0]), rng.random()))
        cut, batch = [], []
        for example in pool:
            if batch and (len(batch) + 1) * len(example[0]) > tokens:
                cut.append(batch)
                batch = []
            batch.append(example)
        rng.shuffle(cut)
        done += cut
    return done[:count]


def tensors(batch: list[tuple[list, int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, (B, S), padded on the right; -100 wherever no loss is taken."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for row, (tokens, start) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return ids, labels


def optimizers(model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> list:
    """Muon (Jordan et al., 2024) for the matrices in the layers, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warm_up: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def save(model: Qwen3ForCausalLM, out: Path, token_ids: dict[str, int]) -> None:
    """config.json, generation_config.json and model.safetensors in bfloat16, without lm_head."""
    end, pad = token_ids["<|im_end|>"], token_ids["<|endoftext|>"]
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **CONFIG}
    config |= {"bos_token_id": pad, "eos_token_id": end, "torch_dtype": "bfloat16"}
    config |= {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
    config |= {"max_window_layers": CONFIG["num_hidden_layers"]}
    config |= {"transformers_version": transformers.__version__}
    write_json(out / "config.json", dict(sorted(config.items())))
    generation = {"bos_token_id": pad, "do_sample": False, "eos_token_id": [end, pad]}
    generation |= {"pad_token_id": pad, "transformers_version": transformers.__version__}
    write_json(out / "generation_config.json", generation)
    weights = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--qwen3-files", type=Path, required=True, help="folder of real Qwen3 files"
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint: a later stage")
    parser.add_argument("--stage", type=int, default=1, choices=sorted(tiny_data.MIXES))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=2500, help="tokens a batch, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    # 1. tokenizer
    template = (args.qwen3_files / "chat_template.jinja").read_text("utf-8")
    if args.init:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (args.out / name).write_bytes((args.init / name).read_bytes())
    else:
        cases = [tiny_data.training_case(rng) for _ in range(6000)]
        texts = [p + c.target for p, c in zip(prompts(cases, template), cases, strict=True)]
        train_tokenizer(texts, args.qwen3_files, args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    token_ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}

    # 2. data
    def make(n: int) -> list[tuple[list, int]]:
        cases = [tiny_data.training_case(rng, args.stage) for _ in range(n)]
        examples = []
        for case, prompt in zip(cases, prompts(cases, template), strict=True):
            start = tokenizer.encode(prompt, add_special_tokens=False).ids
            target = tokenizer.encode(case.target + "<|im_end|>", add_special_tokens=False).ids
            examples.append((start + target, len(start)))
        return examples

    plan = batches(rng, args.steps, args.tokens, make)
    seen = sum(len(ids) for batch in plan for ids, _ in batch)
    print(f"data: {sum(map(len, plan))} examples, {seen} tokens, longest "
          f"{max(len(ids) for batch in plan for ids, _ in batch)}, "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip

    # 3. training
    if args.init:
        model = Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**CONFIG, attn_implementation="sdpa"))
    print(f"model: {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    pair = optimizers(model, args.muon_lr, args.adam_lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in pair]
    begun, average = time.monotonic(), None
    for step, batch in enumerate(plan):
        for optimizer, rate in zip(pair, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, args.steps)
        ids, labels = tensors(batch, token_ids["<|endoftext|>"])
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        kept = wanted != -100  # the output layer runs only where there is a loss
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 49:
            minutes = (time.monotonic() - begun) / 60
            left = minutes / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps} loss {average:.4f}, {minutes:.1f} min, "
                  f"{left:.1f} left", flush=True)  # fmt: skip
        if step + 1 == args.steps // 2:
            save(model, args.out, token_ids)

    # 4. the checkpoint and how it was made
    save(model, args.out, token_ids)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stage": args.stage,
        "seed": args.seed,
        "steps": args.steps,
        "examples": sum(map(len, plan)),
        "tokens": seen,
        "muon_lr": args.muon_lr,
        "adam_lr": args.adam_lr,
        "training_minutes": round((time.monotonic() - begun) / 60, 1),
        "final_loss": round(average, 5),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
    }
    if args.init:
        before = json.loads((args.init / "training.json").read_text("utf-8"))
        record["before"] = before
    write_json(args.out / "training.json", record)
    PreTrainedTokenizerFast.from_pretrained(args.out)  # transformers must take the folder as it is
    Qwen3ForCausalLM.from_pretrained(args.out)
    print(f"saved to {args.out.name}: {record}", flush=True)


if __name__ == "__main__":
    main()
