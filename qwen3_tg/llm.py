"""The public object: a loaded model that takes text, messages or ids.

It ties the rooms below together and knows none of their insides: `Checkpoint` says what is on disk,
`device.choose` how to run it, `Engine` computes, and the text side (tokenizer, template, reply
parser) stands around it.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from inspect import signature
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, NoReturn, TypeVar, cast

import numpy as np

from qwen3_tg import device as devices
from qwen3_tg import prefix_file
from qwen3_tg.chat import (
    ChatTemplate,
    Message,
    check_messages,
    check_tools,
    encode_chat,
    plain_messages,
)
from qwen3_tg.checkpoint import Checkpoint, open_checkpoint
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import ChatError, CheckpointError, UsageError, check_count
from qwen3_tg.overflow import fit
from qwen3_tg.reply import THINK, End, Piece, ReplyParser, Text
from qwen3_tg.reply_loop import ReplyLoop
from qwen3_tg.sampling import Sampling
from qwen3_tg.speculate import Draft, Lookup, Model, Speculation, check_vocabulary
from qwen3_tg.stop_strings import StopStrings
from qwen3_tg.structured import Allowed, Constraint, vocabulary
from qwen3_tg.tokenizer import Tokenizer
from qwen3_tg.tool_loop import ToolLoop
from qwen3_tg.tools import Tool, Toolbox, schemas_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from qwen3_tg.batch import Batch
    from qwen3_tg.generate import Generation, OnStep
    from qwen3_tg.loop_guard import OnNotice
    from qwen3_tg.slots import Slots

# As JSON schemas, or as Python functions whose schema is read from signature and docstring.
Tools = Sequence[Mapping[str, Any] | Callable[..., Any] | Tool]

# A message as the caller writes it, such as a dict[str, str].
M = TypeVar("M", bound=Message)

_HOW_TO_SAMPLE = "how to sample is given by sampling=Sampling(temperature=..., top_p=..., seed=...)"

# Of conversations other than the last one, in the host's memory.
PREFIX_CACHE_BYTES = 2**30


def load(
    model: str | Path = "tiny",
    device: str | None = None,
    dtype: str | None = None,
    context: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    kv_dtype: str | None = None,
    kernels: str | None = None,
    threads: int | None = None,
    speculate: str | None = None,
    draft: str | Path | None = None,
    prefix_cache_bytes: int | None = None,
) -> LLM:
    """Load a model: "tiny" (the embedded one), a Hugging Face directory, a GGUF file, or a name in
    the hub's cache.

    `dtype` is what it computes in: "float32", "float16" or "bfloat16"; by default the best the
    device does well; `kv_dtype` what the cache of keys and values is kept in, one of these or
    "int8"; by default the same. On a CPU `kernels` are "fast" (the default: float16 for the cache,
    and 16 bits for activations that meet integer weights), "exact" (float32 for both; the default
    where `dtype` is "float32") or "generic" (tinygrad's lowering), and `threads` is one a core
    unless it is given.
    `context` is the most tokens of prompt and answer together; by default what the checkpoint was
    made for. Beyond that YaRN is switched on with the factor it takes. `on_progress` is called with
    bytes of weights done and all of them.

    `speculate` "lookup" guesses tokens from what was said before, and `draft`, a smaller model with
    the same tokenizer, says them first: the same answers, in less time where guesses are right.

    Of a text that goes on only what is new is computed, also after others that came in between:
    their keys and values wait in up to `prefix_cache_bytes` of the host's memory (1 GiB; 0: none).

    Sets the environment variables CC, CACHEDB and PARALLEL of this process where tinygrad needs
    it. Raises a Qwen3Error that says what to do: CheckpointError, DeviceError or UsageError."""
    for name, value in (("model", model), ("draft", draft or "")):
        if not isinstance(value, str | PathLike):
            raise UsageError(f"{name} must be a name or a path, found {value!r:.80}")
    with _collecting_later():
        checkpoint = open_checkpoint(str(model))
        config, context, remark = checkpoint.config.with_context(context)
        notes = (*checkpoint.notes, remark) if remark else checkpoint.notes
        policy = devices.choose(device, dtype, kv_dtype, kernels, threads)
        checkpoint = replace(checkpoint, config=config, notes=notes)
        smaller = _draft(draft, policy, context) if draft else None
        return LLM(checkpoint, policy, context, on_progress, speculate, smaller, prefix_cache_bytes)


def _draft(name: str | Path, policy: devices.Policy, context: int) -> LLM:
    """The model that guesses, with this context or the shorter one it was made for. It keeps no
    other conversations: it is small, and their room is the model's."""
    checkpoint = open_checkpoint(str(name))
    own = checkpoint.config.with_context(None)[1]
    config, context, _ = checkpoint.config.with_context(min(context, own))
    return LLM(replace(checkpoint, config=config), policy, context, prefix_cache_bytes=0)


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, Collection) and all(isinstance(id, Integral) for id in ids)


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Python looks for garbage again and again while a vocabulary's 300,000 strings are made: a
    tenth of the time to the first token."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class LLM:
    """A loaded model. `config` is its shape, `tokenizer` None where the checkpoint has none,
    `policy` says which device it runs on and in which types, `shared_bytes` how much of the weights
    is used where it lies in the host's memory, such as a mapped file. `draft` is the model that
    guesses for it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: devices.Policy,
        context: int,
        on_progress: Callable[[int, int], None] | None = None,
        speculate: str | None = None,
        draft: LLM | None = None,
        prefix_cache_bytes: int | None = None,
    ):
        if speculate not in (None, "lookup"):
            raise UsageError(f'speculate must be "lookup" or None, found {speculate!r}')
        if speculate and draft:
            raise UsageError("guesses come from a draft model or from lookup, not from both")
        check_count("prefix_cache_bytes", prefix_cache_bytes, least=0)
        if prefix_cache_bytes is None:
            prefix_cache_bytes = PREFIX_CACHE_BYTES
        self.checkpoint, self.policy, self.context = checkpoint, policy, context
        self.speculate, self.draft = speculate, draft
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = None
        if checkpoint.tokenizer:
            self.tokenizer = Tokenizer(checkpoint.tokenizer, str(checkpoint.path))
        if self.tokenizer and self.tokenizer.has_ids_from(self.config.vocab_size):
            raise CheckpointError(
                f"{checkpoint.path}: its tokenizer has {self.tokenizer.size} tokens, but the model "
                f"only {self.config.vocab_size}: it is the tokenizer of another model"
            )
        if draft:
            check_vocabulary(
                str(draft.checkpoint.path),
                (self.config.vocab_size, draft.config.vocab_size),
                (self.tokenizer, draft.tokenizer),
            )
        from qwen3_tg.start import start_engine

        self._engine, self.shared_bytes = start_engine(
            checkpoint, policy, context, on_progress, prefix_cache_bytes
        )

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's template. Raises ChatError if there is none or it is broken."""
        if self.checkpoint.chat_template is None:
            raise ChatError(
                f"{self.checkpoint.path} has no chat template: it is a base model; "
                "complete plain text with --raw, or llm.generate()"
            )
        try:
            return ChatTemplate(self.checkpoint.chat_template)
        except ChatError as e:
            raise ChatError(f"{self.checkpoint.path}: {e}") from None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text: those of generation_config.json (or config.json), the end of a
        turn in the chat template, and the end of a document."""
        ids = set(self.checkpoint.generation.eos_token_ids)
        if self.tokenizer:
            added = self.tokenizer.added_tokens
            template = self.checkpoint.chat_template or ""
            ids |= {added[t] for t in ("<|im_end|>",) if t in added and t in template}
            ids |= {added[t] for t in ("<|endoftext|>",) if t in added}
        return frozenset(ids)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM can be neither copied nor pickled: its weights are on a device. Threads may "
            "share it; in another process, load it there"
        )

    def lower_by(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Capture graphs within another context than that which applies what was tuned."""
        self._engine.lowering = context

    @property
    def cache_capacity(self) -> int:
        """Positions that the cache has room for at present; it grows up to the context."""
        return self._engine.cache_capacity

    @property
    def bytes_besides(self) -> int:
        """Bytes that the model has besides what tinygrad allocated: `shared_bytes`, and the scratch
        of a device's own kernels."""
        return self.shared_bytes + self._engine.forward.scratch_bytes

    @property
    def prefix_cache_bytes(self) -> int:
        """The most bytes of the host's memory that other conversations are kept in."""
        return self._engine.shelf.limit_bytes

    @property
    def kept(self) -> tuple[int, int]:
        """How many other texts are kept, such as conversations, and how many bytes they take."""
        shelf = self._engine.shelf
        return len(shelf), shelf.nbytes

    def computed(self, ids: Sequence[int]) -> tuple[int, int]:
        """How many of these ids, from the first one on, need not be computed again, and the bytes
        of their keys and values."""
        return self._engine.computed(ids)

    def save_computed(self, path: str | Path, ids: Sequence[int]) -> int:
        """Write the keys and values of what `computed` says, for a later process: whole or not at
        all. How many tokens; of none nothing is written. Raises OSError, and UsageError where there
        is another file."""
        text = self._engine.give(ids)
        if text is None:
            return 0
        path = Path(path)
        if path.exists() and not prefix_file.is_one(path):
            raise UsageError(f"{path}: there is such a file, and it is none of ours")
        prefix_file.write(path, text, prefix_file.facts(self.checkpoint, self.policy))
        return len(text.ids)

    def load_computed(self, path: str | Path) -> int:
        """Take what `save_computed` wrote among what is kept. How many tokens; 0 where they take
        more than `prefix_cache_bytes`.

        Raises UsageError with the reason, where they are not this model's, were computed in other
        types or by another version, or the file is damaged."""
        facts = prefix_file.facts(self.checkpoint, self.policy)
        text = prefix_file.read(Path(path), facts, self._engine.row_bytes)
        return len(text.ids) if self._engine.take(text) else 0

    @property
    def on_kernels(self) -> Callable[[int, int], None] | None:
        """Is told how many of a graph's new kernels have been made, and of how many; before the
        first token, and after the cache has grown."""
        return self._engine.kernels.on_kernels

    @on_kernels.setter
    def on_kernels(self, report: Callable[[int, int], None] | None) -> None:
        self._engine.kernels.on_kernels = report
        if self.draft:
            self.draft.on_kernels = report

    @property
    def can_choose_to_think(self) -> bool:
        """Whether the template has a switch for thinking: those of hybrid models do."""
        return "enable_thinking" in self.chat_template.variables

    @property
    def can_think(self) -> bool:
        """Whether the template knows of thinking: those of hybrid and of Thinking models do."""
        return THINK in self.chat_template.source

    def default_sampling(self, seed: int | None = None, thinking: bool = True) -> Sampling:
        """The checkpoint's own advice, or Qwen's for a hybrid model that is not to think, with this
        seed or a random one."""
        advice = self.checkpoint.generation
        if not thinking and self.can_choose_to_think:
            advice = advice.without_thinking()
        return Sampling(
            temperature=advice.temperature,
            top_p=advice.top_p,
            top_k=advice.top_k,
            min_p=advice.min_p,
            repetition_penalty=advice.repetition_penalty,
            seed=secrets.randbits(32) if seed is None else seed,
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The text of a conversation, by the checkpoint's own template. Raises ChatError, also for
        what the template would leave out in silence, such as a message of another role."""
        messages, schemas = plain_messages(messages), schemas_of(tools)
        check_messages(messages)
        check_tools(schemas)
        names = dict(self.checkpoint.special_tokens) | template_kwargs
        return self.chat_template.render(messages, schemas, add_generation_prompt, **names)

    def fit(
        self,
        messages: Sequence[M],
        tools: Tools | None = None,
        thinking: bool = True,
        room: int | None = None,
    ) -> tuple[list[M], int]:
        """A conversation that fits in the context with `room` tokens for the answer, by default a
        quarter of it: without as many of its oldest turns as needed, and how many those were.

        Raises ContextError where the system message and the last turn alone are too long."""
        check_count("room", room, least=1)
        plain = plain_messages(messages)
        check_messages(plain)
        schemas = schemas_of(tools)

        def count(some: Sequence[Message]) -> int:
            return len(self._encode(some, schemas, thinking, False, {})[1])

        kept, dropped = fit(plain, count, self.context, room)
        return cast(list[M], kept), dropped

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`: (S, V) float32."""
        return self._engine.all_logits(ids)

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after the last of `ids`: (V,) float32. Computes only what differs from the ids
        before, which is quick where they go on."""
        return self._engine.next_logits(ids)

    def generate_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(temperature=0),
        stop_ids: Collection[int] | None = None,
        model: Model | None = None,
    ) -> Generation:
        """The ids that follow, one by one, without the stop id. `max_new_tokens` None: as many as
        the context holds. `stop_ids` None: the checkpoint's own; (): none. `model` gives the logits
        in place of the engine, for one of many generations at once.

        Raises UsageError or ContextError."""
        from qwen3_tg.generate import Generation

        sampling = self._choose_sampling(sampling)
        if stop_ids is None:
            stop_ids = self.stop_ids
        elif not _are_ids(stop_ids):
            raise UsageError(f"stop_ids must be a collection of ids, found {stop_ids!r:.80}")
        speculation = None
        if self.draft and model is None:
            speculation = Speculation(Draft(self.draft._engine))
        elif self.speculate and model is None:
            speculation = Speculation(Lookup())
        model = model or self._engine
        return Generation(model, ids, max_new_tokens, sampling, stop_ids, speculation)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_end: Callable[[End], None] | None = None,
        on_step: OnStep | None = None,
        loop_guard: bool = True,
        on_notice: OnNotice | None = None,
        constraint: Constraint | None = None,
        **unknown: Never,
    ) -> Iterator[str]:
        """Continue a text as it is, without a template; special tokens in it act as such.

        Gives whole characters only. `sampling` None: the checkpoint's advice. `on_end` is told how
        it ended, `on_step` how each token was chosen, `on_notice` what the loop guard did. With a
        `constraint` all that is new has its form, or UnfinishedError is raised."""
        loop = self.completion(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            on_step=on_step,
            loop_guard=loop_guard,
            on_notice=on_notice,
            constraint=constraint,
            **unknown,
        )

        def stream() -> Iterator[str]:
            for piece in loop:
                if isinstance(piece, Text):
                    yield piece.text
                elif isinstance(piece, End) and on_end:
                    on_end(piece)

        return stream()

    def completion(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_step: OnStep | None = None,
        loop_guard: bool = True,
        on_notice: OnNotice | None = None,
        constraint: Constraint | None = None,
        model: Model | None = None,
        **unknown: Never,
    ) -> ReplyLoop:
        """The same as pieces, Text and End. `model` as for generate_ids."""
        from qwen3_tg.loop_guard import LoopGuard

        if unknown:
            name = min(unknown)
            raise UsageError(f"continuing a text has no parameter {name!r}; {_HOW_TO_SAMPLE}")
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt must be a text, found {type(prompt).__name__}")
        if not prompt:
            raise UsageError("the prompt is empty: there is nothing to continue")
        check_count("max_new_tokens", max_new_tokens, least=1)
        strings, tokenizer = StopStrings(stop), self._need_tokenizer()
        sampling = self._choose_sampling(sampling)
        generation = self.generate_ids(tokenizer.encode(prompt), None, sampling, model=model)
        generation.on_step = on_step
        allowed = self._allow(generation, constraint, stop, None)
        guard = LoopGuard(generation, on_notice) if loop_guard else None
        parser = ReplyParser(in_thinking=False, tools=False)
        parser.take_text()
        limits = None, max_new_tokens
        return ReplyLoop(generation, tokenizer, parser, strings, guard, allowed, *limits)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        thinking: bool = True,
        *,
        thinking_budget: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        allow_special: bool = False,
        on_step: OnStep | None = None,
        loop_guard: bool = True,
        on_notice: OnNotice | None = None,
        constraint: Constraint | None = None,
        model: Model | None = None,
        **template_kwargs: Any,
    ) -> ReplyLoop:
        """The model's next turn, in pieces: Thinking, Text and ToolCall as they come, End at last.
        `close()` of what this gives ends it before.

        A message's content is a text, or a list of `{"type": "text", "text": "..."}`, as in
        OpenAI's API, which are joined; parts of another type are refused.
        `thinking_budget` counts tokens of thinking; when they are spent the thinking is closed with
        the sentence Qwen advises, and the answer follows. `max_new_tokens` counts the answer alone.
        `stop` strings end the answer. `allow_special` lets special tokens in the messages act.
        `on_step` is told how each token was chosen. A reply that repeats itself without end is
        helped out of it, or ended, unless `loop_guard` is False; `on_notice` is told what was done.
        `tools` are not run, only told to the model; `chat_with_tools` runs them. With a
        `constraint` the answer, after the thinking, has its form, or UnfinishedError is raised
        after End; it goes with neither tools nor stop strings, which would end it otherwise.
        `model` as for generate_ids."""
        from qwen3_tg.loop_guard import LoopGuard

        messages = plain_messages(messages)
        check_messages(messages)
        schemas = schemas_of(tools)
        check_tools(schemas)
        if not isinstance(thinking, bool):
            raise UsageError(f"thinking must be True or False, found {thinking!r}")
        if unknown := set(template_kwargs) - self.chat_template.variables - {"enable_thinking"}:
            raise UsageError(
                f"chat() has no parameter {min(unknown)!r}, nor has this model's template; "
                f"{_HOW_TO_SAMPLE}"
            )
        check_count("thinking_budget", thinking_budget, least=0)
        check_count("max_new_tokens", max_new_tokens, least=1)
        text, ids = self._encode(messages, schemas, thinking, allow_special, template_kwargs)
        if not ids:
            raise ChatError(f"{self.checkpoint.path}: the chat template renders to nothing")
        in_thinking = text.rstrip("\n").endswith(THINK)
        if in_thinking and not thinking:
            raise UsageError("this model always thinks: its template has no switch for it")
        sampling = self._choose_sampling(sampling, thinking)
        generation = self.generate_ids(ids, None, sampling, model=model)
        generation.on_step = on_step
        may_think = thinking and self.can_choose_to_think
        allowed = self._allow(generation, constraint, stop, schemas, in_thinking, may_think)
        parser = ReplyParser(in_thinking, tools=bool(tools))
        strings = StopStrings(stop)
        guard = LoopGuard(generation, on_notice) if loop_guard else None
        limits = thinking_budget, max_new_tokens
        tokenizer = self._need_tokenizer()
        return ReplyLoop(generation, tokenizer, parser, strings, guard, allowed, *limits)

    def chat_with_tools(
        self,
        messages: Sequence[Message],
        tools: Sequence[Callable[..., Any] | Tool],
        thinking: bool = True,
        *,
        sampling: Sampling | None = None,
        max_rounds: int = 10,
        **options: Any,
    ) -> ToolLoop:
        """Let the model call these functions until it answers: the pieces of all its turns, and the
        results of its calls. The loop's `messages` are the conversation with all of that.

        `options` are those of `chat`, for every turn. What goes wrong in a call, also what a
        function raises, is told to the model as its result. Raises ChatError where it calls in
        more than `max_rounds` turns, and UsageError where a function returns what is neither a text
        nor JSON, which no other call would mend."""
        toolbox, messages = Toolbox(tools), plain_messages(messages)
        chosen = self._choose_sampling(sampling, thinking)

        def ask(messages: Sequence[Message], rounds: int) -> Iterator[Piece]:
            again = chosen.next_turn(rounds)
            return self.chat(messages, toolbox.schemas, thinking, sampling=again, **options)

        return ToolLoop(ask, messages, toolbox, max_rounds)

    def batch(self, size: int = 8) -> Batch:
        """For many conversations or texts, up to `size` at once: more tokens in the same time.

            for answer in llm.batch().answers(conversations, max_new_tokens=100): ...

        On a CPU's own kernels a step of up to 64 gives to the last bit what it gives each alone."""
        from qwen3_tg.batch import Batch

        def start(
            what: Sequence[Message] | str, model: Model, options: dict[str, Any]
        ) -> ReplyLoop:
            begin: Any = self.completion if isinstance(what, str) else self.chat
            try:
                signature(begin).bind(what, model=model, **options)
            except TypeError as e:
                kind = "a text to continue" if isinstance(what, str) else "a conversation"
                raise UsageError(f"options of {kind}: {e}") from None
            loop: ReplyLoop = begin(what, model=model, **options)
            return loop

        return Batch(self.slots(size), start, self._choose_sampling)

    def slots(self, size: int) -> Slots:
        """The same for ids: the logits of up to `size` sequences, step by step."""
        from qwen3_tg.slots import Slots

        return Slots(self._engine, size)

    def _choose_sampling(self, given: Sampling | None, thinking: bool = True) -> Sampling:
        """What was given, or the default for None. Raises UsageError for anything else."""
        if given is None:
            return self.default_sampling(thinking=thinking)
        if not isinstance(given, Sampling):
            found = type(given).__name__
            raise UsageError(f"sampling must be a qwen3_tg.Sampling, found {found}")
        return given

    def _encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
        allow_special: bool,
        template_kwargs: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
            options = {"add_generation_prompt": True, "enable_thinking": thinking}
            return self.render(messages, tools, **(options | dict(template_kwargs)))

        tokenizer = self._need_tokenizer()
        if not allow_special:
            return encode_chat(render, tokenizer, messages, tools)
        text = render(messages, tools)
        return text, tokenizer.encode(text)

    def _allow(
        self,
        generation: Generation,
        constraint: Constraint | None,
        stop: Sequence[str],
        tools: Tools | None,
        opened: bool = False,
        may_think: bool = False,
    ) -> Allowed | None:
        """Let the constraint, if there is one, choose what this generation may take."""
        if constraint is None:
            return None
        if not isinstance(constraint, Constraint):
            raise UsageError(
                "constraint must be a qwen3_tg.Constraint, made by .json_schema(), .regex() or "
                f".lark(), found {constraint!r:.80}"
            )
        if stop or tools:
            raise UsageError(
                "a constraint goes with neither tools nor stop strings: a call or a cut answer "
                "would not have its form"
            )
        tokenizer, stop_ids = self._need_tokenizer(), self.stop_ids
        allowed = Allowed(constraint, self._vocabulary, tokenizer, stop_ids, opened, may_think)
        generation.allow = allowed
        return allowed

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return vocabulary(self._need_tokenizer(), self.config.vocab_size, self.stop_ids)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: no tokenizer.json in it, which text needs; get it from "
                "the same model (ids alone can be given to llm.generate_ids() and llm.logits())"
            )
        return self.tokenizer
