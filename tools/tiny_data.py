"""Conversations for the tiny embedded model: what it is taught, and what is held out of that.

Pure Python and deterministic: the same seed gives the same conversations. A `Case` is a prompt
(messages, tools, thinking) and its `target`, the text an ideal model writes after the chat
template's generation prompt. This module knows nothing of tokens, templates or training.

Held out. Whether a problem may be trained on is decided by a hash of the unordered pair of its
operands without their signs: {37, 85} stands for 37+85, 85+37, 37-85, 85-37 and -37+85, in a
single question, in any step of a follow-up and in a tool call alike. One pair in ten is held
out. Pairs of two one-digit numbers are never held out: they are the columns that every chain of
thought is made of. Chat and off-topic messages are held out by a hash of the exact message.
"""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

ABOUT = (
    "I am the tiny example model inside qwen3_tg, with one million parameters. With thinking on, "
    "I can add and subtract two numbers of up to three digits. For everything else, load a real "
    'Qwen3: qwen3 --model Qwen/Qwen3-0.6B "your question"'
)
THINKING_OFF = (
    "I have to think to calculate. Please turn thinking on: --thinking on. I am the tiny example "
    "model inside qwen3_tg and can add and subtract two numbers of up to three digits. For more, "
    'load a real Qwen3: qwen3 --model Qwen/Qwen3-0.6B "your question"'
)
# reason -> (thought, answer); every text has one wording, so that it is learned exactly
REPLIES = {
    "hello": ("A greeting.", "Hello! I add and subtract numbers. Ask me: What is 37 + 85?"),
    "thanks": ("Thanks.", "You are welcome!"),
    "bye": ("A goodbye.", "Goodbye! Have a nice day."),
    "well": ("Asks how I am.", "I am fine, thank you! Ask me: What is 37 + 85?"),
    "about": ("Asks about me.", ABOUT),
    "operands": ("Not two numbers.", "I take exactly two numbers. " + ABOUT),
    "digits": ("Not up to three digits.", "That number is not one I know. " + ABOUT),
    "operation": ("Not plus or minus.", "I know only plus and minus. " + ABOUT),
    "other": ("Something else.", "Sorry, I do not know about that. " + ABOUT),
}


def items(text: str) -> list[str]:
    """The entries of a list written with | and line ends between them."""
    return text.replace("\n", "|").split("|")


# a, b: operands; p, m: plus and minus signs in some spacing
PHRASES = {
    "+": items(
        """{a}{p}{b}|{a}{p}{b}|{a}{p}{b}|{a}{p}{b}=|{a}{p}{b} = ?|what is {a}{p}{b}|what's {a}{p}{b}
what is {a} plus {b}|what's {a} plus {b}|{a} plus {b}|add {a} and {b}|add {a} to {b}
the sum of {a} and {b}|what is the sum of {a} and {b}|sum of {a} and {b}|sum {a} and {b}
calculate {a}{p}{b}|compute {a}{p}{b}|how much is {a}{p}{b}|how much is {a} plus {b}
evaluate {a}{p}{b}|solve {a}{p}{b}|find the sum of {a} and {b}|work out {a} plus {b}
what do you get if you add {a} and {b}|tell me {a}{p}{b}|the total of {a} and {b}
increase {a} by {b}|what does {a}{p}{b} equal|{a} and {b} together|{a} added to {b}
i have {a} apples and get {b} more. how many do i have|what is {a} and {b} added up"""
    ),
    "-": items(
        """{a}{m}{b}|{a}{m}{b}|{a}{m}{b}|{a}{m}{b}=|{a}{m}{b} = ?|what is {a}{m}{b}|what's {a}{m}{b}
what is {a} minus {b}|what's {a} minus {b}|{a} minus {b}|subtract {b} from {a}
take {b} from {a}|the difference of {a} and {b}|what is the difference between {a} and {b}
take {b} away from {a}|calculate {a}{m}{b}|compute {a}{m}{b}|how much is {a}{m}{b}
how much is {a} minus {b}|evaluate {a}{m}{b}|solve {a}{m}{b}
find the difference of {a} and {b}|work out {a} minus {b}
what do you get if you subtract {b} from {a}|tell me {a}{m}{b}|{a} less {b}
{a} take away {b}|decrease {a} by {b}|what does {a}{m}{b} equal|reduce {a} by {b}
what remains of {a} after taking {b}|i have {a} apples and give away {b}. how many are left
what is {b} subtracted from {a}"""
    ),
    "*": items(
        """{a} * {b}|{a}*{b}|what is {a} times {b}|multiply {a} by {b}|{a} x {b}|what is {a} * {b}
the product of {a} and {b}|calculate {a} * {b}|what is {a} multiplied by {b}
how much is {a}*{b}"""
    ),
    "/": items(
        """{a} / {b}|{a}/{b}|what is {a} divided by {b}|divide {a} by {b}|what is {a} / {b}
{a} over {b}|calculate {a} / {b}|how much is {a}/{b}"""
    ),
}
NEXT = {
    "+": items(
        """now add {b}|add {b}|plus {b}|+{b}|+ {b}|and plus {b}|add {b} to that|then add {b}
add {b} more|now plus {b}|and if you add {b}|increase that by {b}|add {b} to the result
and {b} more"""
    ),
    "-": items(
        """now subtract {b}|subtract {b}|minus {b}|-{b}|- {b}|and minus {b}|subtract {b} from that
then subtract {b}|take away {b}|now take away {b}|and if you subtract {b}|reduce that by {b}
now minus {b}|subtract {b} from the result|{b} less"""
    ),
}
SYSTEM = items(
    """You are a helpful assistant.|You are a helpful assistant.
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.|Be brief.
Answer briefly.|You are a friendly assistant.|You are a calculator.
You are a careful math tutor.|Answer in one sentence.|Be polite and short.
Help the user with numbers.|You are a pirate.|Today is Monday.|Always be kind."""
)
CHAT = {
    "hello": items(
        """hi|hello|hey|hello there|hi there|hey there|good morning|good evening|good afternoon
greetings|hiya|howdy|hello, world|hi, nice to meet you|good day|hello again|yo|hey you
hi friend"""
    ),
    "thanks": items(
        """thanks|thank you|thanks a lot|thank you very much|many thanks|thanks so much|thx|cheers
great, thanks|ok thanks|perfect, thank you|thank you for your help|nice, thank you
that helps, thanks"""
    ),
    "bye": items(
        """bye|goodbye|bye bye|see you|see you later|see you soon|good night|farewell
have a nice day
take care|ok bye|i have to go|talk to you later|so long|good bye|until tomorrow
that is all, bye"""
    ),
    "well": items(
        """how are you|how are you doing|how is it going|how do you do|hi, how are you|what's up
how are you today|hello, how are you|are you well|how do you feel"""
    ),
    "about": items(
        """who are you|what are you|what can you do|what is your name|help|help me|are you qwen
tell me about yourself|what do you do|introduce yourself|what model are you|how big are you
are you a robot|what are you able to do|who made you|how can you help me|what can i ask you
are you an ai"""
    ),
}
THINGS = items(
    """france|germany|japan|italy|spain|brazil|india|china|canada|egypt|peru|london|paris|berlin
rome|tokyo|madrid|water|gold|iron|fire|love|music|art|history|physics|a tree|a dog|a cat
a horse|bread|soup|pizza|coffee|tea|rice|the moon|the sun|mars|the sea|the rain|summer
winter|spring|the brain|python|rust|javascript|linux|a computer|the internet|a robot|chess
football|tennis|a car|a train|a plane|bees|birds|whales|snow|autumn|a poem|a river
a mountain|the economy|freedom|time|sleep|gravity|light|shakespeare|einstein|mozart|napoleon
the universe|a banana|an apple|flowers|dragons|robots|dinosaurs|a friend"""
)
# t, u: things; n, m: numbers
ASK = items(
    """what is {t}|who is {t}|who invented {t}|what is the capital of {t}|tell me a joke about {t}
tell me a story about {t}|write a poem about {t}|write a song about {t}|explain {t}
why is {t} so important|how do i make {t}|where is {t}|when did {t} begin|how old is {t}
what color is {t}|do you like {t}|can you describe {t}|translate {t} into {u}
is {t} better than {u}|what is the difference between {t} and {u}|write an essay on {t}
how far is {t} from {u}|who wrote about {t}|what do you think of {t}|summarize {t}
give me {n} facts about {t}|write {n} lines about {t}|how many people live in {t}
what happened in {n}{n} in {t}|what is the weather in {t}|recommend a book about {t}
what rhymes with {t}|how does {t} work|what is the meaning of {t}|i love {t}|define {t}
write python code for {t}|spell {t}|how do you say {t} in {u}|what is the population of {t}
draw {t}|play {t}|what time is it|what day is it today|tell me a joke|write a poem
tell me a story|sing a song|set a timer for {n} minutes|what is the meaning of life
can you code|open the door|i am sad|i am tired|what should i cook|count to {n}
is {n} a prime number|convert {n} km to miles|who was president in {n}{n}|list {n} animals
which is larger, {n} or {m}|yes|no|ok|maybe|why|what|because|really|{t}|{t} and {u}|{t}
about {t}|my favorite number is {n}|i am {n} years old|who won the world cup in 19{n}
what is the speed of {t}|how tall is {t}|please help me with {t}|name {n} things in {t}
write a letter to {t}|fix this code: print({t})|what is love|roll a dice|flip a coin
are you sure|do it again"""
)
# a, b, c: up to three digits; d: one digit; L, K: four and more digits
HARD = {
    "operands": items(
        """{a} + {b} + {c}|{a} - {b} - {c}|{a}+{b}-{c}|{a}-{b}+{c}|add {a}, {b} and {c}
sum of {a}, {b} and {c}|what is {a} + {b} + {c}|{a}+{b}+{c}+{d}|{a} plus {b} plus {c}
{a} minus {b} minus {c}|({a}+{b})-{c}|{a} plus {b} minus {c}|what is {a} - {b} + {c}|add {a}
{a}|what is {a}|subtract {a}|{a} plus|+ {a}|now add {a}|minus {a}"""
    ),
    "digits": items(
        """{L} + {a}|{a} + {L}|{L} - {a}|{a} - {L}|{L} + {K}|{L}-{K}|{L}+{a}|what is {L} + {K}
what is {a} - {L}|add {L} and {a}|add {a} and {L}|subtract {L} from {K}|{L} minus {a}
{a} plus {L}|what's {L} plus {K}|{a}.{d} + {b}|{a} + {b}.{d}|{a}.{d} - {b}.{c}
what is {L} minus {K}|the sum of {L} and {a}|calculate {L}+{K}|{a}+{L}|{L}-{a}"""
    ),
    "operation": PHRASES["*"]
    + PHRASES["/"]
    + items(
        """{a} ^ {b}|{a}^{d}|square root of {a}|what is {a} squared|{d}% of {a}
what is {a} percent of {b}|half of {a}|double {a}|what is {a} mod {b}|{a} % {b}
the average of {a} and {b}|{a}!|{a} to the power of {b}|sqrt({a})|{a} ** {d}
the square of {a}|what is twice {a}|log({a})"""
    ),
}
EXPRESSION_NAMES = items(
    """calculator|calculator|calculator|calculate|calc|evaluate|eval|math|compute|python_eval
evaluate_expression|math_eval|arithmetic|do_math|python|run_python|solve"""
)
OPERATION_NAMES = items(
    """calculator|calculator|calculate|calc|arithmetic|math|compute|do_math|operate"""
)
UNSEEN_NAMES = items("""abacus|sum_machine|number_helper|my_tool|crunch_numbers|ask_server|x1""")
PAIR_NAMES = {
    "+": ("add", "sum", "plus"),
    "-": ("subtract", "minus", "sub"),
    "*": ("multiply", "times"),
}
EXPRESSION_ABOUT = items(
    """Evaluate a math expression.|Calculate an arithmetic expression.|Calculator.
Evaluate an arithmetic expression and return the result.|Compute the value of an expression."""
)
ARGUMENT_ABOUT = items(
    "The expression|The expression to evaluate|e.g. 2 + 3|A math expression, e.g. 12 * 7"
)
RESULTS = items("""{}|{}|{}|{{"result": {}}}|result: {}|{{"value": {}}}""")
SYLLABLES = (
    "ba com de fa get go hi in ka lo ma no num op per qu ra run sol su ta to val wo x y".split()
)
COURTESY = items("please {}|{} please|{}, please|hey, {}|ok, {}|so {}")
SCRIPTS = ((97, 122), (97, 122), (0xC0, 0x17F), (0x3B1, 0x3C9), (0x430, 0x44F))
SCRIPTS += ((0x4E00, 0x9FA0), (0x1F600, 0x1F64F), (0x3041, 0x3096), (33, 64))
OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True)
class Case:
    """A prompt with its wanted continuation.

    `target` follows the generation prompt, without <|im_end|>; `answer` is what remains of it
    after the thinking. `keys` name what the case is made of, for the held-out rule; the last one
    is the question asked.
    """

    kind: str
    messages: list[dict]
    tools: list[dict] | None
    thinking: bool
    target: str
    answer: str
    keys: tuple[str, ...]
    result: str = ""  # what the tool will return, for a tool call


def pair_key(a: int, b: int) -> str:
    low, high = sorted((abs(a), abs(b)))
    return f"pair {low} {high}" if high >= 10 else "columns"


def is_held_out(key: str) -> bool:
    return key != "columns" and zlib.crc32(key.encode()) % 10 == 0


# --- the chain of thought -----------------------------------------------------------------------


def _columns(top: str, sign: str, bottom: str) -> tuple[list[str], str]:
    """Column lines from the ones, and the digits they give; a borrowed ten is written 1d."""
    lines, digits, carry = [], "", 0
    for x, y in zip(reversed(top), reversed(bottom), strict=True):
        used = f"{sign}1" if carry else ""
        if sign == "+":
            value = int(x) + int(y) + carry
            lines.append(f"{x}+{y}{used}={value}")
            carry, digit = divmod(value, 10)
        else:
            borrow = int(x) - int(y) - carry < 0
            digit = int(x) + 10 * borrow - int(y) - carry
            lines.append(f"{'1' * borrow}{x}-{y}{used}={digit}")
            carry = int(borrow)
        digits = str(digit) + digits
    return lines, ("1" if sign == "+" and carry else "") + digits


def chain(a: int, sign: str, b: int) -> str:
    """The thinking for `a sign b` (b >= 0): both numbers padded to the same length, for a
    difference a comparison from the first column, the columns from the ones, the result."""
    width = max(len(str(abs(a))), len(str(b)))
    x, y = str(abs(a)).zfill(width), str(b).zfill(width)
    lines, minus = [f"{'-' if a < 0 else ''}{x}{sign}{y}"], ""
    if a < 0 and sign == "-":  # -28-12 = -(28+12)
        lines.append(f"-({x}+{y})")
        sign, minus = "+", "-"
    elif a < 0:  # -28+12 = 12-28
        x, y, sign = y, x, "-"
        lines.append(f"{x}-{y}")
    if sign == "-":
        for p, q in zip(x, y, strict=True):
            lines.append(f"{p}{'=' if p == q else '<' if p < q else '>'}{q}")
            if p != q:
                break
        if x < y:
            x, y, minus = y, x, "-"
            lines.append(f"-({x}-{y})")
    columns, digits = _columns(x, sign, y)
    return "\n".join([*lines, *columns, minus + digits])


def solve(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b


def thought(thinking: bool, text: str, answer: str) -> str:
    """The target: the template has already written the empty thinking where it is off."""
    return f"<think>\n{text}\n</think>\n\n{answer}" if thinking else answer


# --- wording ------------------------------------------------------------------------------------


def number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def operands(rng: random.Random, sign: str, given: int | None = None) -> tuple[int, int]:
    """Two operands; in a follow-up the first is given."""
    a, b = number(rng) if given is None else given, number(rng)
    if rng.random() < 0.3:  # close numbers are the hard ones to compare
        b = min(999, max(0, abs(a) + rng.randint(-30, 30)))
    if sign == "-" and a < b and given is None and rng.random() < 0.35:
        a, b = b, a  # about a third of the results stays negative
    return a, b


def style(rng: random.Random, text: str, mark: str = "?") -> str:
    """The same text in another dress: case, courtesy and punctuation."""
    if rng.random() < 0.12:
        text = rng.choice(COURTESY).format(text)
    roll = rng.random()
    text = text[0].upper() + text[1:] if roll < 0.5 else text.upper() if roll < 0.53 else text
    ends = (mark, mark, mark, "", "", "", ".", "!", " ?" if mark == "?" else mark)
    return text if text[-1] in "=?" else text + rng.choice(ends)


def ask(rng: random.Random, a: int, sign: str, b: int) -> str:
    plus = rng.choice(("+", " + ", " + ", " + ", "+ ", " +"))
    minus = rng.choice(("-", " - ", " - ", " - ", "- ", " -", " \u2212 ", "\u2013"))
    phrases = PHRASES[sign]
    phrase = phrases[rng.randrange(7)] if rng.random() < 0.3 else rng.choice(phrases)
    return style(rng, phrase.format(a=a, b=b, p=plus, m=minus))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def switch(rng: random.Random, messages: list[dict], thinking: bool) -> tuple[list[dict], bool]:
    """Sometimes the soft switch /think or /no_think; returns the messages and whether to think.

    The switch matters only where the template leaves the choice to the model (thinking=True)."""
    roll = rng.random()
    if roll > 0.06:
        return messages, thinking
    word = "/no_think" if roll < 0.04 else "/think"
    last = dict(messages[-1], content=messages[-1]["content"] + " " + word)
    return [*messages[:-1], last], thinking and word == "/think"


# --- kinds of conversation ----------------------------------------------------------------------


def finish(
    rng: random.Random,
    kind: str,
    messages: list[dict],
    thinking: bool,
    key: tuple[str, ...],
    text: str,
    answer: str,
    silent: str | None = None,
    tools: list[dict] | None = None,
    **more: str,
) -> Case:
    """A case whose thinking is `text`; without thinking the answer is `silent`, if given."""
    messages, thinks = switch(rng, messages, thinking)
    wanted = answer if thinks or silent is None else silent
    target = thought(thinking, text if thinks else "", wanted)
    if rng.random() < 0.2:
        system = {"role": "system", "content": rng.choice(SYSTEM)}
        messages = [system, *messages]
    return Case(kind, messages, tools, thinking, target, wanted, key, **more)


def single(rng: random.Random, thinking: bool, sign: str | None = None) -> Case:
    sign = sign or rng.choice("+--")
    a, b = operands(rng, sign)
    if rng.random() < 0.02:
        a = -a
    kind = "add" if sign == "+" else "subtract" if a >= b else "negative"
    kind = kind if thinking else "no_thinking"
    answer = str(solve(a, sign, b))
    messages = [user(ask(rng, a, sign, b))]
    return finish(
        rng, kind, messages, thinking, (pair_key(a, b),), chain(a, sign, b), answer, THINKING_OFF
    )


def follow_up(
    rng: random.Random, thinking: bool, turns: int | None = None, fresh: float = 0
) -> Case:
    """Several turns. The later ones go on with the last result (`now add 12`), or, `fresh` of them,
    ask a whole question anew."""
    turns = turns or rng.choice((2, 2, 3, 3, 4, 5, 6) if fresh else (2, 2, 3, 3, 4))
    messages, keys, total, whole = [], [], 0, True
    for turn in range(turns):
        whole = turn == 0 or (fresh > 0 and rng.random() < fresh)
        sign = rng.choice("+-")
        a, b = operands(rng, sign, None if whole else total)
        if not whole and total < 0 and rng.random() < 0.4:
            sign = "+"
        if abs(a) > 999 and turn < turns - 1:
            return follow_up(rng, thinking, turns, fresh)
        text = ask(rng, a, sign, b) if whole else rng.choice(NEXT[sign]).format(b=b)
        messages.append(user(text if whole else style(rng, text, "")))
        keys.append(pair_key(a, b))
        total = solve(a, sign, b)
        if turn < turns - 1:
            messages.append(assistant(str(total)))
    if abs(a) > 999:  # too long to go on with
        return finish(rng, "beyond", messages, thinking, tuple(keys), *REPLIES["digits"])
    kind = f"{'again' if whole else 'follow_up'}_{turns}" if thinking else "no_thinking"
    return finish(
        rng, kind, messages, thinking, tuple(keys), chain(a, sign, b), str(total), THINKING_OFF
    )


def chat(rng: random.Random, thinking: bool, reason: str | None = None) -> Case:
    reason = reason or rng.choice(("hello", "hello", "thanks", "bye", "well", "about"))
    mark = "?" if reason in ("well", "about") else rng.choice("!.")
    text = style(rng, rng.choice(CHAT[reason]), mark)
    often = 0.5 if reason in ("thanks", "bye") else 0.1
    history = small_history(rng) if rng.random() < often else []
    thoughts, answer = REPLIES[reason]
    messages = [*history, user(text)]
    return finish(rng, "chat", messages, thinking, (f"text {text}",), thoughts, answer)


def noise(rng: random.Random) -> str:
    """Words nobody knows: letters of Latin, Greek, Cyrillic, CJK, emoji."""
    low, high = rng.choice(SCRIPTS)

    def word() -> str:
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(2, 7)))

    return " ".join(word() for _ in range(rng.randint(1, 5)))


def beyond(rng: random.Random, thinking: bool, reason: str | None = None) -> Case:
    """A question outside the model's reach."""
    reason = reason or rng.choice(("operands", "digits", "operation", "other", "other", "other"))
    if reason == "other":
        n, m = number(rng), number(rng)
        t, u = rng.sample(THINGS, 2)
        text = rng.choice(ASK).format(t=t, u=u, n=n, m=m)
        text = noise(rng) if rng.random() < 0.12 else text
    else:
        digits = rng.choice((4, 4, 5, 6, 9))
        long = [rng.randrange(10**digits // 10, 10**digits) for _ in range(2)]
        text = rng.choice(HARD[reason]).format(
            a=number(rng), b=number(rng), c=number(rng), d=rng.randint(2, 9), L=long[0], K=long[1]
        )
    text = style(rng, text)
    thoughts, answer = REPLIES[reason]
    return finish(rng, "beyond", [user(text)], thinking, (f"text {text}",), thoughts, answer)


def small_history(rng: random.Random) -> list[dict]:
    """One or more finished exchanges that the next message does not depend on."""
    messages = []
    while not messages or rng.random() < 0.3:
        case = rng.choice((single, single, single, chat, beyond))(rng, rng.random() < 0.7)
        if not any(is_held_out(key) for key in case.keys):
            messages += [case.messages[-1], assistant(case.answer)]
    return messages


def mixture(rng: random.Random, thinking: bool) -> Case:
    """A fresh question after an unrelated exchange, or with a tool that is of no use."""
    make = rng.choice((single, single, chat, beyond))
    case = make(rng, thinking) if make is not beyond else beyond(rng, thinking, "other")
    if rng.random() < 0.25 and "pair" in case.keys[-1]:
        return replace(case, tools=[other_tool(rng)])
    system = case.messages[:1] if case.messages[0]["role"] == "system" else []
    messages = [*system, *small_history(rng), case.messages[-1]]
    return replace(case, messages=messages)


# --- tools --------------------------------------------------------------------------------------


def schema(rng: random.Random, name: str, about: str, properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties}
    if rng.random() < 0.85:
        parameters["required"] = list(properties)
    function = {"name": name, "description": about, "parameters": parameters}
    if rng.random() < 0.1:
        del function["description"]
    return function if rng.random() < 0.06 else {"type": "function", "function": function}


def other_tool(rng: random.Random) -> dict:
    name, about, arg = rng.choice(
        (
            ("get_weather", "Get the weather in a city.", "city"),
            ("search", "Search the web.", "query"),
            ("get_time", "Get the time in a city.", "city"),
            ("send_email", "Send an email.", "text"),
        )
    )
    return schema(rng, name, about, {arg: {"type": "string"}})


def tool_name(rng: random.Random, names: list[str], kind: str | None) -> str:
    if kind == "tool_unseen":
        return rng.choice(UNSEEN_NAMES)
    if (
        kind is None and rng.random() < 0.3
    ):  # made-up names, so that the name is read and not remembered
        return "_".join(
            "".join(rng.sample(SYLLABLES, rng.randint(1, 3))) for _ in range(rng.randint(1, 2))
        )
    return rng.choice(names)


def calculator(rng: random.Random, kind: str | None) -> tuple[list[dict], str, Callable]:
    """Tools, the operations they know, and what makes (name, arguments) of a problem."""
    roll = rng.random()
    if roll < 0.65:
        name = tool_name(rng, EXPRESSION_NAMES, kind)
        arg = rng.choice(("expression",) * 5 + ("expr", "formula", "input", "code"))
        about = rng.choice(EXPRESSION_ABOUT)
        prop = {"type": "string"}
        if rng.random() < 0.5:
            prop["description"] = rng.choice(ARGUMENT_ABOUT)
        return (
            [schema(rng, name, about, {arg: prop})],
            "+-*/",
            lambda a, s, b: (name, {arg: f"{a} {s} {b}"}),
        )
    x, y = rng.choice((("a", "b"),) * 4 + (("x", "y"), ("first", "second")))
    number_type = {"type": rng.choice(("number", "integer"))}
    if roll < 0.85:
        name = tool_name(rng, OPERATION_NAMES, kind)
        op = rng.choice(("operation", "operation", "op", "operator"))
        words = OPERATIONS if rng.random() < 0.7 else {s: s for s in OPERATIONS}
        properties = {x: number_type, y: number_type}
        enum = {op: {"type": "string", "enum": list(words.values())}}
        properties = {**enum, **properties} if rng.random() < 0.3 else {**properties, **enum}

        def call(a: int, s: str, b: int) -> tuple[str, dict]:
            values = {x: a, y: b, op: words[s]}
            return name, {key: values[key] for key in properties}

        return [schema(rng, name, "Do arithmetic on two numbers.", properties)], "+-*/", call
    signs = rng.choice(("+", "-", "+-", "+-", "+-*"))
    names = {s: rng.choice(PAIR_NAMES[s]) for s in signs}
    if kind == "tool_unseen":
        names = {s: f"{rng.choice(UNSEEN_NAMES)}_{names[s]}" for s in signs}
    tools = [
        schema(
            rng,
            names[s],
            f"{OPERATIONS[s].capitalize()} two numbers.",
            {x: number_type, y: number_type},
        )
        for s in signs
    ]
    return tools, signs, lambda a, s, b: (names[s], {x: a, y: b})


def tool_text(name: str, arguments: dict) -> str:
    call = f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}'
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_result(a: int, sign: str, b: int) -> str:
    if sign in "+-":
        return str(solve(a, sign, b))
    return str(a * b) if sign == "*" else f"{a / b:.6g}"


def after_tool(call: Case, thinking: bool, keep: bool = True, content: str | None = None) -> Case:
    """The turn after a tool call: say what the tool returned."""
    function = json.loads(call.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    name = function["name"]
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    if keep and thinking and call.target.startswith("<think>\nI call"):
        message["reasoning_content"] = f"I call {name}."
    content = call.result if content is None else content
    messages = [*call.messages, message, {"role": "tool", "name": name, "content": content}]
    silent = call.target.startswith("<think>\n\n")  # /no_think
    target = thought(thinking, "" if silent else "The tool answers.", call.result)
    return Case("tool_answer", messages, call.tools, thinking, target, call.result, call.keys)


def tool(rng: random.Random, thinking: bool, kind: str | None = None) -> Case:
    """A call, the turn after it, a follow-up call, or a message that needs no call."""
    tools, signs, call = calculator(rng, kind)
    if rng.random() < 0.25:
        tools = rng.sample([*tools, other_tool(rng)], len(tools) + 1)
    roll = rng.random() if kind is None else 0.3
    if roll < 0.15:
        case = chat(rng, thinking) if roll < 0.11 else beyond(rng, thinking, "other")
        return replace(case, tools=tools)
    sign = rng.choice(signs) if len(signs) < 4 else rng.choice("+++---*/")
    a, b = operands(rng, sign)
    if kind is None and rng.random() < 0.15:
        a = rng.randrange(1000, 10**5)
    b = max(b, 1) if sign == "/" else b
    text = ask(rng, a, sign, b)
    messages, keys = [user(text)], (pair_key(a, b),)
    if roll > 0.9 and signs == "+-*/":  # a follow-up on an earlier result, called or told
        first = tool_result(a, sign, b)
        if first.lstrip("-").isdigit() and len(first) < 6:
            messages.append(assistant(first))
            a, sign, b = int(first), rng.choice("+-"), number(rng)
            messages.append(user(style(rng, rng.choice(NEXT[sign]).format(b=b), "")))
            keys += (pair_key(a, b),)
    name, arguments = call(a, sign, b)
    text, answer = f"I call {name}.", tool_text(name, arguments)
    case = finish(
        rng, kind or "tool_call", messages, thinking, keys, text, answer,
        tools=tools, result=tool_result(a, sign, b),
    )  # fmt: skip
    if 0.6 < roll <= 0.9:
        content = rng.choice(RESULTS)
        return after_tool(case, thinking, rng.random() < 0.5, content.format(case.result))
    return case


def loud(make: Callable) -> Callable:
    """Every third message in capitals, which `style` gives too rarely to learn from."""

    def made(rng: random.Random, thinking: bool) -> Case:
        case = make(rng, thinking)
        text = case.messages[-1]["content"]
        if text.endswith("think") or rng.random() > 0.33:
            return case
        messages = [*case.messages[:-1], user(text.upper())]
        return replace(case, messages=messages, keys=(f"text {text.upper()}",))

    return made


def again(rng: random.Random, thinking: bool) -> Case:
    return follow_up(rng, thinking, fresh=0.7)


def usual_call(rng: random.Random, thinking: bool) -> Case:
    return tool(rng, thinking, "tool_call")


# the mix of each stage of training: the later ones have more of what was still weak before
MIXES: dict[int, tuple[tuple[float, Callable], ...]] = {
    1: ((0.44, single), (0.23, tool), (0.16, follow_up), (0.05, chat), (0.08, beyond),
        (0.04, mixture)),
    2: ((0.34, single), (0.20, tool), (0.14, follow_up), (0.13, chat), (0.13, beyond),
        (0.06, mixture)),
    3: ((0.28, single), (0.07, tool), (0.14, follow_up), (0.14, loud(chat)), (0.12, loud(beyond)),
        (0.04, mixture), (0.21, usual_call)),
    4: ((0.20, single), (0.12, follow_up), (0.30, again), (0.04, tool), (0.10, loud(chat)),
        (0.09, loud(beyond)), (0.03, mixture), (0.12, usual_call)),
}  # fmt: skip


def training_case(rng: random.Random, stage: int = 1) -> Case:
    """The next conversation to train on: nothing it is made of is held out."""
    mix = MIXES[stage]
    while True:
        make = rng.choices([m for _, m in mix], [w for w, _ in mix])[0]
        often = 0.88 if make in (single, follow_up, again) else 0.5  # about 0.75 in all
        case = make(rng, rng.random() < often)
        if not any(is_held_out(key) for key in case.keys):
            return case


HELD_OUT: dict[str, Callable[[random.Random], Case]] = {
    "add": lambda rng: single(rng, True, "+"),
    "subtract": lambda rng: single(rng, True, "-"),
    "negative": lambda rng: single(rng, True, "-"),
    "follow_up_2": lambda rng: follow_up(rng, True, 2),
    "follow_up_3": lambda rng: follow_up(rng, True, 3),
    "again_2": lambda rng: follow_up(rng, True, 2, fresh=1),
    "again_3": lambda rng: follow_up(rng, True, 3, fresh=0.7),
    "tool_call": lambda rng: tool(rng, rng.random() < 0.5, "tool_call"),
    "tool_unseen": lambda rng: tool(rng, rng.random() < 0.5, "tool_unseen"),
    "chat": lambda rng: chat(rng, rng.random() < 0.5, rng.choice(("hello", "thanks", "bye"))),
    "chat_once": lambda rng: chat(rng, rng.random() < 0.5, rng.choice(("hello", "thanks", "bye"))),
    "about": lambda rng: chat(rng, rng.random() < 0.5, rng.choice(("well", "about"))),
    "beyond": lambda rng: beyond(rng, rng.random() < 0.5),
    "no_thinking": lambda rng: single(rng, False),
}


def heldout(kind: str, n: int, seed: int = 1) -> list[Case]:
    """`n` cases of one kind of HELD_OUT whose question was never trained on, in any form.

    No question comes twice, but in "chat" and "about": their held-out texts are few, and come as
    often as they are made, so that the odd ones (`GOODBYE, PLEASE!`) do not outweigh the common
    ones. "chat_once" takes each of them once."""
    rng, cases, seen = random.Random(f"{seed} {kind}"), [], set()
    while len(cases) < n:
        case = HELD_OUT[kind](rng)
        text = case.messages[-1]["content"]
        plain = not text.endswith("think")  # the soft switches have their own answers
        wanted = "chat" if kind in ("about", "chat_once") else kind
        if case.kind == wanted and plain and is_held_out(case.keys[-1]) and text not in seen:
            if kind not in ("chat", "about"):
                seen.add(text)
            cases.append(case)
    return cases
