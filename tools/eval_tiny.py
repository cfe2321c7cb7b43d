"""Measure the tiny embedded model on held-out problems, and record the cases that tests use.

    python tools/eval_tiny.py qwen3_tg/tiny --engine qwen3_tg --seed 11 --card
    python tools/eval_tiny.py qwen3_tg/tiny --sample tests/data/tiny_heldout.json
    python tools/eval_tiny.py qwen3_tg/tiny --golden tests/data/tiny_golden.json

Decoding is greedy in float32 on the stored bfloat16 weights. A case is right only if the text
after the thinking is exactly the expected one and the model stopped by itself at <|im_end|>.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_data
from tiny_data import Case

MAX_NEW_TOKENS = 200
START, END = "<!-- results: start -->", "<!-- results: end -->"
TITLES = {
    "add": "addition, up to three digits",
    "subtract": "subtraction, up to three digits",
    "negative": "subtraction with a negative result",
    "follow_up_2": "second turn (`now add 12`)",
    "follow_up_3": "third turn",
    "again_2": "second turn, a whole question again",
    "again_3": "third turn, a whole question again",
    "tool_call": "calculator call, usual names",
    "end_to_end": "calculator call and the answer after it",
    "tool_unseen": "calculator call, names never seen in training",
    "chat": "greetings, thanks, goodbyes",
    "chat_once": "the same, each held-out wording once (many are in capitals)",
    "about": "questions about itself (`who are you`, `how are you`)",
    "beyond": "question outside its reach",
    "no_thinking": "arithmetic without thinking: asks to turn it on",
}


@dataclass(frozen=True)
class Output:
    ids: list[int]
    text: str
    stopped: bool

    @property
    def answer(self) -> str:
        """The text after the thinking."""
        _, mark, after = self.text.partition("</think>")
        return after.lstrip("\n") if mark else self.text


class TransformersEngine:
    """Batched greedy decoding with Hugging Face transformers."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(2)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def render(self, case: Case) -> str:
        return self.tokenizer.apply_chat_template(
            case.messages,
            tools=case.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=case.thinking,
        )

    def run(self, cases: list[Case], batch_size: int = 50) -> list[Output]:
        texts = [self.render(case) for case in cases]
        order = sorted(range(len(cases)), key=lambda i: len(texts[i]))
        outputs: dict[int, Output] = {}
        ends = self.model.generation_config.eos_token_id
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
            with self.torch.no_grad():
                full = self.model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for i, row in zip(chosen, full[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(row) if token in ends), len(row))
                text = self.tokenizer.decode(row[:length])
                outputs[i] = Output(row[:length], text, row[length : length + 1] == ends[:1])
        return [outputs[i] for i in range(len(cases))]


class OurEngine:
    """One prompt after another with qwen3_tg."""

    def __init__(self, path: Path) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import qwen3_tg

        self.llm = qwen3_tg.load(path)

    def run(self, cases: list[Case]) -> list[Output]:
        outputs = []
        for case in cases:
            prompt = self.llm.render(
                case.messages,
                tools=case.tools,
                add_generation_prompt=True,
                enable_thinking=case.thinking,
            )
            new = list(
                self.llm.generate_ids(
                    self.llm.tokenizer.encode(prompt),
                    max_new_tokens=MAX_NEW_TOKENS,
                    stop_ids=None,
                )
            )
            # the stop id is not given out: fewer ids than allowed means that it came
            outputs.append(Output(new, self.llm.tokenizer.decode(new), len(new) < MAX_NEW_TOKENS))
        return outputs


ENGINES = {"transformers": TransformersEngine, "qwen3_tg": OurEngine}


def is_right(case: Case, output: Output) -> bool:
    return output.stopped and output.answer == case.answer


def measure(engine, n: int, seed: int, kinds: list[str], show: int) -> dict[str, dict[str, int]]:
    """kind -> cases, right ones and stopped ones; the first `show` wrong ones go to stderr."""
    results = {}
    for kind in kinds:
        started = time.monotonic()
        cases = tiny_data.heldout(kind, n, seed)
        outputs = engine.run(cases)
        results[kind] = score(kind, cases, outputs, show)
        if kind == "tool_call":  # the right calls go on to the answer; a wrong call is wrong
            pairs = zip(cases, outputs, strict=True)
            again = [tiny_data.after_tool(c, c.thinking) for c, o in pairs if is_right(c, o)]
            more = score("end_to_end", again, engine.run(again), show)
            results["end_to_end"] = more | {"cases": n}
        seconds = time.monotonic() - started
        print(f"{kind}: {results[kind]} {seconds:.0f} s", file=sys.stderr, flush=True)
    return results


def score(kind: str, cases: list[Case], outputs: list[Output], show: int) -> dict[str, int]:
    wrong = [(c, o) for c, o in zip(cases, outputs, strict=True) if not is_right(c, o)]
    for case, output in wrong[:show]:
        print(f"  {kind}: {case.messages[-1]['content']!r} wanted {case.target!r}, "
              f"got {output.text!r}", file=sys.stderr)  # fmt: skip
    stopped = sum(output.stopped for output in outputs)
    return {"cases": len(cases), "right": len(cases) - len(wrong), "stopped": stopped}


def table(results: dict[str, dict[str, int]], engine: str, seed: int) -> str:
    lines = ["| held-out problems | right | of | share |", "| --- | ---: | ---: | ---: |"]
    for kind, title in TITLES.items():
        if kind in results:
            right, cases = results[kind]["right"], results[kind]["cases"]
            lines.append(f"| {title} | {right} | {cases} | {right / cases:.1%} |")
    runs = sum(r["cases"] for k, r in results.items() if k != "end_to_end")
    stopped = sum(r["stopped"] for k, r in results.items() if k != "end_to_end")
    lines += ["", f"Stopped at `<|im_end|>` within {MAX_NEW_TOKENS} tokens: {stopped} of {runs}."]
    lines += [f"Engine: {engine}, greedy, float32 arithmetic on the stored bfloat16 weights, "
              f"evaluation seed {seed}."]  # fmt: skip
    return "\n".join(lines)


def write_card(card: Path, text: str) -> None:
    """Replace what is between the markers of the model card."""
    old = card.read_text("utf-8")
    if START not in old or END not in old:
        raise SystemExit(f"error: {card} has no {START} ... {END}")
    before, after = old.partition(START)[0], old.partition(END)[2]
    card.write_text(f"{before}{START}\n{text}\n{END}{after}", "utf-8")


def as_json(case: Case) -> dict:
    return {
        "kind": case.kind,
        "messages": case.messages,
        "tools": case.tools,
        "thinking": case.thinking,
        "check": "exact",
        "expected": case.answer,
    }


SAMPLE = {"add": 5, "subtract": 5, "negative": 5, "follow_up_2": 4, "follow_up_3": 4}
SAMPLE |= {"again_2": 4, "again_3": 3, "tool_call": 5}
SAMPLE |= {"chat": 4, "about": 2, "beyond": 4, "no_thinking": 3}


def write_sample(engine, path: Path, seed: int) -> None:
    """A fixed sample for CI: of each kind the first held-out cases that come out right."""
    chosen, skipped = [], 0
    for kind, count in SAMPLE.items():
        cases = tiny_data.heldout(kind, 2 * count, seed)
        if kind == "tool_call":
            cases += [tiny_data.after_tool(case, case.thinking) for case in cases[:3]]
        good = [is_right(c, o) for c, o in zip(cases, engine.run(cases, 1), strict=True)]
        kept = [case for case, fine in zip(cases, good, strict=True) if fine]
        extra = [case for case in kept if case.kind == "tool_answer"]
        skipped += len(cases) - len(kept)
        chosen += kept[:count] + extra
    meta = {
        "what": "held-out cases for the tiny model; `expected` is the text after </think>",
        "made_by": f"tools/eval_tiny.py --sample, seed {seed}",
        "left_out_as_wrong": skipped,
    }
    dump(path, {"_meta": meta, "cases": [as_json(case) for case in chosen]})


def golden_cases() -> list[Case]:
    """Prompts over all modes whose exact greedy ids are recorded."""
    rng = random.Random(3)
    expression = {"expression": {"type": "string", "description": "e.g. 2 + 3"}}
    tools = [tiny_data.schema(rng, "calculator", "Evaluate a math expression.", expression)]
    arguments = {"expression": "37 + 85"}
    function = {"name": "calculator", "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    system = {"role": "system", "content": "You are a helpful assistant."}
    sum_ = tiny_data.user("What is 37 + 85?")
    told = tiny_data.assistant("122")
    rows: list[tuple[str, list[dict], list[dict] | None, bool]] = [
        ("addition", [sum_], None, True),
        ("addition, no thinking", [sum_], None, False),
        ("negative result, system", [system, tiny_data.user("12 - 40")], None, True),
        ("follow-up", [sum_, told, tiny_data.user("now subtract 150")], None, True),
        ("greeting", [tiny_data.user("Hello!")], None, True),
        ("greeting, no thinking", [tiny_data.user("Hello!")], None, False),
        ("beyond", [tiny_data.user("What is the capital of France?")], None, True),
        ("tool call", [sum_], tools, False),
        ("tool answer", [sum_, call, {"role": "tool", "content": "122"}], tools, True),
        ("soft switch", [tiny_data.user("What is 37 + 85? /no_think")], None, True),
    ]
    return [Case(kind, m, t, on, "", "", ()) for kind, m, t, on in rows]


def write_golden(engine: TransformersEngine, path: Path) -> None:
    import transformers

    records = []
    for case in golden_cases():
        (output,) = engine.run([case], 1)
        prompt = engine.render(case)
        records.append(
            as_json(case)
            | {"check": "ids", "expected": output.answer, "prompt": prompt}
            | {"prompt_ids": engine.tokenizer(prompt)["input_ids"], "new_ids": output.ids}
            | {"text": output.text, "stopped": output.stopped}
        )
    meta = {
        "what": "greedy continuations; new_ids without the stop id, at most max_new_tokens",
        "made_with": f"transformers {transformers.__version__}, float32, CPU",
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    dump(path, {"_meta": meta, "cases": records})


def dump(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    print(f"wrote {path} ({len(value['cases'])} cases)", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="checkpoint folder")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="transformers")
    parser.add_argument("--n", type=int, default=300, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(tiny_data.HELD_OUT))
    parser.add_argument("--show", type=int, default=0, help="wrong cases of each kind to print")
    parser.add_argument("--card", action="store_true", help="write the table into PATH/README.md")
    parser.add_argument("--sample", type=Path, help="write CI's fixed sample here (transformers)")
    parser.add_argument("--golden", type=Path, help="write the golden values here (transformers)")
    args = parser.parse_args()
    if (args.sample or args.golden) and args.engine != "transformers":
        parser.error("--sample and --golden are recorded with --engine transformers")
    engine = ENGINES[args.engine](args.path)
    if args.sample:
        write_sample(engine, args.sample, args.seed)
    if args.golden:
        write_golden(engine, args.golden)
    if args.sample or args.golden:
        return
    text = table(measure(engine, args.n, args.seed, args.kinds, args.show), args.engine, args.seed)
    print(text)
    if args.card:
        write_card(args.path / "README.md", text)


if __name__ == "__main__":
    main()
