"""Messages to ids, through the checkpoint's own chat template.

The template is a program that came with the weights, so it runs in jinja2's sandbox. It is given
the environment that transformers gives it (utils/chat_template_utils.py), so that the same template
gives the same text. Knows nothing of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from qwen3_tg.errors import ChatError
from qwen3_tg.reply import CALL, END_CALL, END_THINK, THINK
from qwen3_tg.tokenizer import Tokenizer

Message = Mapping[str, Any]
_EXAMPLE = '[{"role": "user", "content": "hi"}]'
_ROLES = ("system", "user", "assistant", "tool")
# Unicode's characters for private use: none of them has a meaning in a text.
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
# Tags that a former answer may hold and that mean there what they say.
_ASSISTANT_TAGS = frozenset((THINK, END_THINK, CALL, END_CALL))


class ChatTemplate:
    """`source` is jinja2 text. Raises ChatError where it is not valid."""

    def __init__(self, source: str):
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.meta import find_undeclared_variables
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what to train on; for generating it means what is in it."""

            tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.source = source
        try:
            self._template = env.from_string(source)
            # the names it reads that it does not set itself
            self.variables = frozenset(find_undeclared_variables(env.parse(source)))
        except TemplateError as e:
            raise ChatError(f"the checkpoint's chat template is not valid jinja2: {e}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The text the model reads. Raises ChatError where the template refuses the messages."""
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as e:
            raise ChatError(f"the chat template cannot render these messages: {e}") from None


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what a template would drop in silence. Raises ChatError naming the message."""
    _check_list(messages)
    if not messages:
        raise ChatError("no messages: a chat needs at least one")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            found = message.get("role") if isinstance(message, Mapping) else message
            raise ChatError(
                f"message {n}: role must be one of {', '.join(_ROLES)}, found {found!r}"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ChatError(f"message {n}: content must be a text, found {type(content).__name__}")


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """The same messages, where each content that is a list of parts, as in OpenAI's API, is one
    text: its parts in order, with nothing between them. A template would drop such a list.

    Raises ChatError naming the message for a part that is no text."""
    _check_list(messages)
    return [_plain(message, n) for n, message in enumerate(messages)]


def _plain(message: Message, n: int) -> Message:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)) or not content:
        return message
    for m, part in enumerate(content):
        where = f"message {n}, part {m} of its content"
        if not isinstance(part, Mapping):
            raise ChatError(
                f'{where}: must be {{"type": "text", "text": "..."}}, found {part!r:.80}'
            )
        if part.get("type") != "text":
            raise ChatError(
                f"{where}: type is {part.get('type')!r:.80}; this model reads text only"
            )
        if not isinstance(part.get("text"), str):
            raise ChatError(f"{where}: text must be a text, found {part.get('text')!r:.80}")
    return {**message, "content": "".join(part["text"] for part in content)}


def _check_list(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list such as {_EXAMPLE}, found {messages!r:.80}")


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse what a template would render as something else. Raises ChatError."""
    if tools is None:
        return
    is_list = isinstance(tools, Iterable) and not isinstance(tools, (str, Mapping))
    if not is_list or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError(f"tools must be a list of JSON schemas as dicts, found {tools!r:.80}")


def encode_chat(
    render: Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str],
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[str, list[int]]:
    """The rendered text and its ids, where only the template's own special tokens act. Contents
    are texts: of parts that are joined later, two could make a token.

    `<|im_end|>` in a user's content is ten characters and ends no turn. To tell the two apart after
    rendering, a mark that occurs nowhere else is put into each such text before it. The template
    sees the mark too: content that looks like a tag is not treated as one there either."""
    texts = json.dumps([list(map(dict, messages)), tools], ensure_ascii=False, default=str)
    mark = next((letter for letter in map(chr, _PRIVATE_USE) if letter not in texts), None)
    if mark is None:
        raise ChatError("the messages hold every character for private use: none is left as a mark")

    def broken(value: Any, keep: frozenset[str]) -> Any:
        if isinstance(value, str):
            return tokenizer.added_pattern.sub(
                lambda m: m[0] if m[0] in keep else m[0][0] + mark + m[0][1:], value
            )
        if isinstance(value, Mapping):
            return {broken(k, keep): broken(v, keep) for k, v in value.items()}
        return [broken(v, keep) for v in value] if isinstance(value, (list, tuple)) else value

    none: frozenset[str] = frozenset()

    def safe(message: Message) -> Message:
        keep = _ASSISTANT_TAGS if message["role"] == "assistant" else none
        return {k: broken(v, keep if k == "content" else none) for k, v in message.items()}

    text = render([safe(m) for m in messages], tools and broken(tools, none))
    ids: list[int] = []
    end = 0
    for special in tokenizer.added_pattern.finditer(text):
        ids += tokenizer.encode(text[end : special.start()].replace(mark, ""), plain=True)
        ids.append(tokenizer.added_tokens[special[0]])
        end = special.end()
    ids += tokenizer.encode(text[end:].replace(mark, ""), plain=True)
    return text.replace(mark, ""), ids


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not jinja2's own, which escapes <, > and & for HTML
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
