"""What can be typed: commands, options, and the prompt from the command line and stdin."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from qwen3_tg.cli.sizes import read_size
from qwen3_tg.device import DTYPE_NAMES, KERNELS, KV_DTYPE_NAMES
from qwen3_tg.errors import UsageError

# Command: the module in this room and its function that runs it, imported only then.
COMMANDS = {
    "generate": "generate:generate",
    "chat": "chat:chat",
    "tokenize": "tokenize:tokenize",
    "devices": "devices:show",
    "plan": "plan:plan",
    "pull": "pull:pull",
    "quantize": "quantize:quantize",
    "bench": "bench:bench",
    "check": "check:run",
    "kernels": "kernels:kernels",
    "tune": "tune:tune",
    "replay": "replay:run",
}
# Of other programs of this kind.
_NO_COMMANDS = ("help", "version", "serve", "run", "list", "ls", "show", "rm", "ps", "models")
_ENDLESS = ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_READ = ("session", "tools", "json_schema", "grammar", "input", "file", "text")
_FILES = ("session", "tools", "record", "draft", "json_schema", "grammar", "input", "output")
_DESCRIPTION = """\
Qwen3 on whatever hardware you have.

  qwen3 "What is 37 + 85?"          ask the small embedded model
  qwen3 --model DIR "Hello"         ask a Qwen3 on disk, or one in the Hugging Face cache
  cat FILE | qwen3 "summarise"      the prompt, an empty line, and then what comes on stdin
  qwen3 chat                        talk; Ctrl-C stops an answer, Ctrl-D ends
  qwen3 generate --input IN --output OUT     answer many prompts, several at once
  qwen3 tokenize "Hello"            show the tokens of a text
  qwen3 devices                     show what this machine can compute on
  qwen3 plan Qwen3-32B              show how much memory a model takes, before it is downloaded
  qwen3 pull Qwen/Qwen3-0.6B        download a model
  qwen3 quantize MODEL OUT.gguf     make a model smaller
  qwen3 bench MODEL                 measure how fast it is here
  qwen3 check MODEL                 see whether this machine computes it right
  qwen3 kernels MODEL               read the kernels that the model becomes
  qwen3 tune MODEL                  search faster kernels for this device, once
  qwen3 replay FILE --device D      go through a recorded answer again on another device
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its options; without a command word it is `generate`. Raises UsageError."""
    for argument in argv:
        if not _is_text(argument):
            raise UsageError(f"an argument is not valid UTF-8: {argument!r}")
    named = bool(argv) and argv[0] in COMMANDS
    options = _parser(argv[0] if named else None).parse_args(argv[1:] if named else argv)
    options.command = argv[0] if named else "generate"
    for name in _FILES:
        if getattr(options, name, None) == "":  # such as a variable of a shell that is not set
            raise UsageError(f"--{name.replace('_', '-')} must not be empty")
    for name in _READ:
        if os.path.realpath(getattr(options, name, None) or "") in _ENDLESS:
            raise UsageError(f"{getattr(options, name)} is a device that has no end, and no file")
    if not named and len(options.prompt) == 1 and options.prompt[0] in COMMANDS:
        word = options.prompt[0]
        raise UsageError(
            f"the command comes first: qwen3 {word} [options]; "
            f"to send the word itself as a prompt: qwen3 generate {word}"
        )
    options.looks_like_a_command = not named and _looks_like_a_command(options.prompt)
    return options


def _looks_like_a_command(prompt: list[str]) -> bool:
    """Whether it begins with a word of another program, or with one of ours mistyped."""
    if not prompt or len(prompt) > 2:
        return False
    word = prompt[0].lower()
    known = word in _NO_COMMANDS
    return known or bool(difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.8))


def read_text(words: list[str], keep_end: bool = False) -> str:
    """Words joined by spaces; `-` stands for stdin; piped stdin that no `-` asks for follows after
    an empty line. Line breaks at the end of stdin are dropped unless `keep_end`.

    Raises UsageError."""
    piped = not sys.stdin.isatty() if sys.stdin else False
    stdin = _read_stdin() if piped or "-" in words else ""
    if not keep_end:
        stdin = stdin.rstrip("\r\n")
    if "-" in words:
        return " ".join(stdin if word == "-" else word for word in words)
    return "\n\n".join(part for part in (" ".join(words), stdin) if part)


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"stdin is not valid UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}; "
            "convert it first, for instance with iconv"
        ) from None


def _is_text(argument: str) -> bool:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parser(command: str | None) -> _Parser:
    parser = _Parser(
        prog=f"qwen3 {command}" if command else "qwen3",
        description=_DESCRIPTION if command in (None, "generate") else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command is None:
        parser.add_argument("--version", action="version", version=f"qwen3_tg {_version()}")
    if command in _OWN_ARGUMENTS:
        _OWN_ARGUMENTS[command](parser)
        return parser
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="M",
        help="a Hugging Face directory, a GGUF file, a name in the local hub cache "
        "(Qwen/Qwen3-0.6B, or Qwen/Qwen3-8B-GGUF:Q4_K_M), or tiny",
    )
    if command == "tokenize":
        _add_tokenize(parser)
        return parser
    if command == "chat":
        _add_chat(parser)
    else:
        parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="the text; - is stdin")
        parser.add_argument(
            "--raw", action="store_true", help="continue the prompt as it is, without a template"
        )
        parser.add_argument(
            "--n", type=int, default=1, metavar="N", help="so many answers, each drawn anew (1)"
        )
        parser.add_argument(
            "--explain",
            action="store_true",
            help="show for each token the candidates after each step of sampling",
        )
        parser.add_argument(
            "--record", metavar="FILE", help="write down the answer for qwen3 replay"
        )
        _add_batch(parser)
    _add_run(parser)
    _add_generation(parser)
    if command == "chat":
        _add_chat_tools(parser)
    return parser


def _add_batch(parser: _Parser) -> None:
    many = parser.add_argument_group("many prompts")
    many.add_argument(
        "--input",
        metavar="FILE",
        help='answer each line of it (- is stdin): a JSON text, or {"prompt": ...} or '
        '{"messages": [...]}, with settings of its own',
    )
    many.add_argument(
        "--output",
        metavar="FILE",
        help="a JSON line for each answer; a file that is there is gone on with (default: stdout)",
    )
    many.add_argument("--batch", type=int, metavar="N", help="so many at once (8)")
    many.add_argument(
        "--retry", action="store_true", help="ask lines again whose answer is an error"
    )


def _add_run(parser: _Parser) -> None:
    run = parser.add_argument_group("where it runs")
    _add_device(run)
    _add_kernels(run)
    guesses = run.add_mutually_exclusive_group()
    guesses.add_argument(
        "--speculate",
        choices=("lookup",),
        help="guess the next tokens from what was said before and compute several at once: the "
        "same answer, sooner where it repeats what is there",
    )
    guesses.add_argument(
        "--draft", metavar="M", help="the same with guesses of a smaller model with this tokenizer"
    )
    run.add_argument(
        "--prefix-cache",
        type=partial(read_size, "--prefix-cache", least=0),
        metavar="SIZE",
        help="main memory for the computed tokens of other conversations, and the most that goes "
        "with --session into FILE.kv (1GiB; 0 is none)",
    )
    run.add_argument("-v", "--verbose", action="store_true", help="show device, counts and times")


def _add_device(
    run: argparse.ArgumentParser | argparse._ArgumentGroup, context: bool = True
) -> None:
    run.add_argument(
        "--device",
        metavar="D",
        help="CPU, METAL, AMD, CUDA ... (see: qwen3 devices), or several: CUDA:0,CUDA:1",
    )
    run.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="what it computes in; by default the best the device does well",
    )
    if not context:
        return
    run.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer together; beyond what the model was made for, YaRN "
        "is switched on with the factor it takes",
    )


def _add_kernels(run: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--kv-dtype",
        choices=KV_DTYPE_NAMES,
        help="of the cache of keys and values; by default as --dtype, or float16 with fast "
        "kernels; int8 takes about half of that",
    )
    run.add_argument(
        "--kernels",
        choices=KERNELS,
        help="on a CPU: fast, or exact (float32 throughout; the default with --dtype float32), or "
        "generic (tinygrad's own, as on every other device)",
    )
    run.add_argument(
        "--threads", type=int, metavar="N", help="on a CPU: how many compute (default: all cores)"
    )


def _add_generation(parser: _Parser) -> None:
    reply = parser.add_argument_group("the answer (defaults are the checkpoint's own)")
    reply.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    reply.add_argument("--thinking", choices=("on", "off"), help="think first (default: on)")
    reply.add_argument(
        "--thinking-budget", type=int, metavar="N", help="most tokens of thinking; then it answers"
    )
    reply.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of the answer, thinking apart"
    )
    reply.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    reply.add_argument("--top-p", type=float, metavar="P", help="likeliest tokens that sum up to P")
    reply.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens; 0 is all")
    reply.add_argument("--min-p", type=float, metavar="P", help="at least P times the likeliest's")
    reply.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="P",
        help="above 1 makes tokens of prompt and answer less likely",
    )
    reply.add_argument(
        "--presence-penalty", type=float, metavar="P", help="taken from each token of the answer"
    )
    reply.add_argument(
        "--frequency-penalty", type=float, metavar="P", help="the same, as often as it is there"
    )
    reply.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=B",
        help="add B to the logit of this token (qwen3 tokenize shows ids); -inf forbids it; may be "
        "repeated",
    )
    reply.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")
    reply.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated"
    )
    reply.add_argument(
        "--no-loop-guard",
        dest="loop_guard",
        action="store_false",
        help="let an answer repeat itself without end",
    )
    reply.add_argument(
        "--allow-special",
        action="store_true",
        help="let special tokens such as <|im_end|> in your text act as such",
    )
    reply.add_argument(
        "--tools",
        metavar="FILE",
        help="a JSON list of functions that the model may call; its calls are printed as JSON, and "
        'in a chat answered, by the "command" of a function or by you',
    )

    parser.set_defaults(constraint=None)  # what one of these says, once it was read
    form = reply.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", metavar="FILE", help="answer with JSON that satisfies this schema"
    )
    form.add_argument("--regex", metavar="RE", help="answer with a match of all of RE")
    form.add_argument(
        "--grammar", metavar="FILE", help="answer as this grammar says, in Lark's syntax"
    )


def _add_chat_tools(parser: _Parser) -> None:
    tools = parser.add_argument_group("the commands in --tools FILE")
    tools.add_argument("--yes-tools", action="store_true", help="run them without asking")
    tools.add_argument(
        "--tool-timeout", type=float, metavar="S", help="seconds that one may run (30)"
    )
    tools.add_argument(
        "--tool-output",
        type=int,
        metavar="N",
        help="bytes of what one prints that the model is given (16384)",
    )
    tools.add_argument(
        "--tool-rounds",
        type=int,
        metavar="N",
        help="rounds of calls before it must answer (10)",
    )


def _add_chat(parser: _Parser) -> None:
    talk = parser.add_argument_group("the conversation (/help lists its commands)")
    talk.add_argument(
        "--overflow",
        choices=("error", "shift"),
        default="error",
        help="when the conversation no longer fits in the context: say so, or leave out its oldest "
        "turns, but not the system message",
    )
    talk.add_argument(
        "--session",
        metavar="FILE",
        help="go on with it and its settings if it is there; keep it after every turn",
    )
    talk.add_argument(
        "--plain", action="store_true", help="show text as it comes: no Markdown, no folding"
    )
    talk.add_argument(
        "--full-thinking", action="store_true", help="leave the thinking on the screen"
    )
    talk.add_argument(
        "--no-history",
        dest="history",
        action="store_false",
        help="keep nothing of what you type for the next time",
    )


def _add_tokenize(parser: _Parser) -> None:
    parser.description = "Show the tokens of a text: of each its id, and the text it stands for."
    parser.add_argument("prompt", nargs="*", metavar="TEXT", help="the text; - is stdin")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="only the ids, on one line")
    form.add_argument("--count", action="store_true", help="only how many there are")
    form.add_argument("--decode", action="store_true", help="the other way: TEXT holds ids")


def _add_plan(parser: _Parser) -> None:
    parser.description = (
        "Show how much memory a model takes, before it is downloaded: exactly for weights and\n"
        "cache; scratch is an estimate. Reads headers only, on the hub too."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a released name (Qwen3-32B, Qwen3-32B-AWQ), a name on the hub, a directory, a file",
    )
    parser.add_argument(
        "--quant",
        metavar="Q",
        help="what it would take if quantised so: q4_k_m, awq ... or several, q8_0,q4_k_m; all",
    )
    parser.add_argument(
        "--context",
        metavar="N",
        help="tokens of prompt and answer together; or several, 4096,32768",
    )
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPE_NAMES, help="of the cache of keys and values"
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="for so many prompts at once, as with generate --input",
    )
    parser.add_argument("--draft", metavar="M", help="with this model to guess for it")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="plan for a GPU with so much, such as 24GB, not for this one",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--markdown", action="store_true", help="a table for documents")


def _add_pull(parser: _Parser) -> None:
    parser.description = "Fetch a model from the Hugging Face hub, or go on where it stopped."
    parser.add_argument("name", metavar="NAME", help="Qwen/Qwen3-0.6B; without an owner it is Qwen")
    parser.add_argument("--type", metavar="T", help="a GGUF of this type, such as Q4_K_M")
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit (default: main)")
    parser.add_argument("--json", action="store_true", help="what was fetched, as JSON")


def _add_quantize(parser: _Parser) -> None:
    from qwen3_tg.quantize.types import CHOICES, MIXES

    parser.description = "Write a float checkpoint as a GGUF file with fewer bits a weight."
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a GGUF file, a name in the hub cache, or tiny"
    )
    parser.add_argument("out", metavar="OUT", help="the file to write: NAME.gguf")
    parser.add_argument(
        "--type",
        type=str.lower,
        choices=CHOICES,
        default="q4_k_m",
        metavar="T",
        help=f"one of {', '.join(CHOICES)} (default: q4_k_m)",
    )
    parser.add_argument(
        "--embeddings",
        type=str.lower,
        choices=[choice for choice in CHOICES if choice not in MIXES],
        metavar="T",
        help="another type for the embedding and the output (default: as llama.cpp)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="measure the perplexity on a text, before and after"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def _add_devices(parser: _Parser) -> None:
    parser.description = (
        "Show every device that tinygrad knows: whether it works here, which one is taken and\n"
        "why, and what the others lack, with the command that gets it."
    )
    parser.add_argument("--device", metavar="D", help="say what is missing of this one, or take it")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_bench(parser: _Parser) -> None:
    parser.description = (
        "Measure how fast a model reads prompts and writes tokens, as llama-bench does. With\n"
        "--shape its weights are random, so that nothing needs to be downloaded."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as --model elsewhere; tiny")
    parser.add_argument("--shape", metavar="NAME", help="a released model's shape: Qwen3-8B")
    parser.add_argument("--quant", metavar="Q", help="how --shape stores weights (default: bf16)")
    _add_device(parser)
    _add_kernels(parser)
    counts = (
        ("-p", "512", "tokens of the prompt"),
        ("-n", "128", "tokens to decode, one by one"),
        ("-d", "0", "tokens in the cache before that"),
        ("-b", "1", "sequences to decode at once, in turn with one alone"),
    )
    for option, default, what in counts:
        several = "1,8" if option == "-b" else "0,4096"
        parser.add_argument(
            option, default=default, metavar="N", help=f"{what}; or several, {several} ({default})"
        )
    parser.add_argument(
        "-r", type=int, default=5, metavar="N", help="rounds, after one that is not counted (5)"
    )
    parser.add_argument(
        "--no-first-token",
        dest="first_token",
        action="store_false",
        help="leave away the time to the first token of a new process",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs, with every round")
    form.add_argument("--csv", action="store_true", help="the same, a line a test")


def _add_check(parser: _Parser) -> None:
    parser.description = (
        "Compare every step of a model on a device with the same in numpy, layer by layer, and\n"
        "name the one that is wrong. Exit code: 0 right, 1 wrong, 2 it could not be done."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as --model elsewhere; tiny")
    _add_device(parser)
    _add_kernels(parser)
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of the prompt (default: more than a chunk)"
    )
    parser.add_argument("--json", action="store_true", help="for programs, with every step")


def _add_kernels_command(parser: _Parser) -> None:
    parser.description = (
        "Show each operation of a layer with the kernels it becomes: source, bytes, operations,\n"
        "and time where it runs. With --target they are those of a device that is not here,\n"
        "lowered and, where its compiler is installed, compiled. Exit code 1: one did not compile."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="as --model elsewhere, or a released name; tiny"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="which one (0)")
    parser.add_argument("--quant", metavar="Q", help="as if it were stored so: q4_k_m, bf16 ...")
    parser.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="CUDA:sm_90, AMD:gfx1100, METAL:Apple7 ... or several, or all",
    )
    _add_device(parser, context=False)
    _add_kernels(parser)
    parser.add_argument("--source", action="store_true", help="print the sources too")
    parser.add_argument("--html", metavar="FILE", help="write a page with sources side by side")
    parser.add_argument("--json", action="store_true", help="for programs, with the sources")


def _add_tune(parser: _Parser) -> None:
    parser.description = (
        "Search faster ways to lower the kernels of a model on this device. What is found is kept\n"
        "and used from then on, and can be given to another machine with the same device. Ctrl-C\n"
        "keeps what was found so far."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as --model elsewhere; tiny")
    parser.add_argument("--shape", metavar="NAME", help="a released model's shape: Qwen3-8B")
    parser.add_argument("--quant", metavar="Q", help="how --shape stores weights (default: bf16)")
    _add_device(parser)
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPE_NAMES, help="of the cache of keys and values"
    )
    parser.add_argument("--kernels", choices=("generic",), help="needed on a CPU")
    parser.add_argument("--beam", type=int, default=4, metavar="N", help="ways kept a step (4)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        metavar="M",
        help="begin no other kernel after so long (60)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--export", dest="export_to", metavar="FILE", help="write what is known")
    form.add_argument("--import", dest="import_from", metavar="FILE", help="take what is in FILE")


def _add_replay(parser: _Parser) -> None:
    parser.description = (
        "Go through an answer recorded by qwen3 --record FILE again, on another device or in\n"
        "other types, and say where it differs: really, or by a near tie. Exit code 1: it really\n"
        "differs."
    )
    parser.add_argument("file", metavar="FILE", help="what --record wrote")
    parser.add_argument("--model", metavar="M", help="where the model is here, if elsewhere")
    _add_device(parser, context=False)
    _add_kernels(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


# Commands that take none of the options of a run.
_OWN_ARGUMENTS: dict[str | None, Callable[[_Parser], None]] = {
    "devices": _add_devices,
    "plan": _add_plan,
    "pull": _add_pull,
    "quantize": _add_quantize,
    "bench": _add_bench,
    "check": _add_check,
    "kernels": _add_kernels_command,
    "tune": _add_tune,
    "replay": _add_replay,
}


def _version() -> str:
    try:
        return version("qwen3-tg")
    except PackageNotFoundError:  # run from the source tree
        from qwen3_tg import __version__

        return __version__
