"""Better ways to lower kernels, found by search on one kind of device and kept for it.

tinygrad chooses by rules how a kernel is split over threads and unrolled; its beam search tries
ways and times them. What was found is kept in a file of the user's cache, one for each kind of
device, and used whenever a kernel is the same to the last shape. The file can be given to another
machine with the same device. It holds names and numbers, no code.

Touches tinygrad's internals: `realize.lower_and_compile`, which it stands before, its `Scheduler`,
`beam_search` and `Opt`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen3_tg import compiler
from qwen3_tg import device as devices
from qwen3_tg.atomic import replacing
from qwen3_tg.device.names import family, one_line
from qwen3_tg.errors import UsageError

_FORMAT = 1
NO_TIME = "left as it is: no time left"  # what came of a kernel that was not searched
_TIMES = 5
Way = list[tuple[str, int | None, Any]]
"""Optimisations in order, each as tinygrad's Opt: op, axis, argument."""


@dataclass(frozen=True)
class Kind:
    """What a tuning holds for: `what` is the device's own name, where it has one."""

    tinygrad: str
    device: str
    renderer: str
    arch: str
    what: str

    @staticmethod
    def of(device: str) -> Kind:
        """That of a device that works."""
        from tinygrad.device import Device

        renderer, kind = Device[device].renderer, family(device)
        # a CPU's code is made for this very processor, whatever arch says
        arch = compiler.fingerprint() if kind == "CPU" else renderer.target.arch
        name = type(renderer).__name__
        return Kind(version("tinygrad"), kind, name, arch, devices.describe(device))


@dataclass
class Tuning:
    """`ways` by the key of a kernel; an empty way says that tinygrad's rules were not beaten.
    `seconds` before and after, as measured when it was found."""

    kind: Kind
    ways: dict[str, Way] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes with what it holds; "" for nothing."""
        text = json.dumps(sorted((key, way) for key, way in self.ways.items() if way))
        return hashlib.sha256(text.encode()).hexdigest()[:12] if len(text) > 2 else ""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, kernels that are compiled are lowered in the ways that were found."""
        with _before_compiling(lambda sinks: {s: self._way(s.key.hex()) for s in sinks}):
            yield

    @contextlib.contextmanager
    def searching(
        self, beam: int, until: float, on_kernel: Callable[[int, int, str], None]
    ) -> Iterator[None]:
        """While this lasts, a way is searched for each new kernel and kept, `beam` ways at a time,
        until the clock (time.monotonic) says `until`. `on_kernel` is told the number of a kernel,
        how many there are, and what came of it."""

        def search(sinks: list[Any]) -> dict[Any, Way]:
            for number, sink in enumerate(sinks, start=1):
                key = sink.key.hex()
                if key in self.ways:
                    on_kernel(number, len(sinks), "known")
                elif time.monotonic() > until:
                    on_kernel(number, len(sinks), NO_TIME)
                else:
                    on_kernel(number, len(sinks), self._search(key, sink, beam))
                    save(self)
            return {sink: self._way(sink.key.hex()) for sink in sinks}

        with _before_compiling(search):
            yield

    def _way(self, key: str) -> Way:
        return self.ways.get(key, [])

    def _search(self, key: str, sink: Any, beam: int) -> str:
        from tinygrad.codegen.opt import KernelOptError
        from tinygrad.codegen.opt.postrange import Scheduler, args_from_ast
        from tinygrad.codegen.opt.search import beam_search
        from tinygrad.device import Device

        device = next(p for p in sink.backward_slice if p.op.name == "PARAM").arg.device
        scheduler = Scheduler(sink, Device[device].renderer)
        scheduler.convert_loop_to_global()
        buffers, var_vals = args_from_ast(sink, device)
        try:
            before = _seconds(sink, buffers, var_vals)
            found = beam_search(scheduler, buffers, var_vals, beam, disable_cache=True)
            way: Way = [(opt.op.name, opt.axis, opt.arg) for opt in found.applied_opts]
            after = _seconds(with_way(sink, way), buffers, var_vals)
        except (RuntimeError, KernelOptError, AssertionError) as e:
            self.ways[key] = []
            return f"left as it is: {one_line(e)}"
        self.ways[key] = way if after < before else []
        self.seconds[key] = before, min(before, after)
        return f"{before * 1e6:.1f} -> {min(before, after) * 1e6:.1f} µs"


def with_way(sink: Any, way: Way) -> Any:
    """A kernel that will be lowered so."""
    from dataclasses import replace

    from tinygrad.codegen.opt import Opt, OptOps

    opts = tuple(
        Opt(OptOps[op], axis, tuple(arg) if isinstance(arg, list) else arg) for op, axis, arg in way
    )
    return sink.replace(arg=replace(sink.arg, opts_to_apply=opts))


def for_policy(policy: devices.Policy) -> Tuning:
    """What is kept for the device of a policy; empty where kernels are not tinygrad's."""
    kind = Kind.of(policy.devices[0])
    return load(kind) if policy.kernels == "generic" else Tuning(kind)


def load(kind: Kind) -> Tuning:
    """What is kept for a kind of device; empty where there is nothing, or something damaged."""
    try:
        return read(_path(kind), kind)
    except UsageError:
        return Tuning(kind)


def save(tuning: Tuning) -> None:
    """Keep it, whole or not at all."""
    with replacing(_path(tuning.kind)) as part:
        write(part, tuning)


def write(path: Path, tuning: Tuning) -> None:
    """As a file that can be given away. Raises OSError."""
    kind = vars(tuning.kind)
    data = {"format": _FORMAT, "kind": kind, "ways": tuning.ways, "seconds": tuning.seconds}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(path: Path, kind: Kind) -> Tuning:
    """Such a file. Raises UsageError where it is none, or not for this kind of device."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: not a tuning file: not JSON: {e}") from None
    if not isinstance(data, dict) or not {"format", "kind", "ways", "seconds"} <= set(data):
        raise UsageError(f"{path}: not a tuning file: qwen3 tune --export FILE writes one")
    if data["format"] != _FORMAT:
        raise UsageError(f"{path}: format {data['format']!r}, this version reads {_FORMAT!r}")
    try:
        found = Kind(**data["kind"])
        ways = {str(key): _checked(way) for key, way in data["ways"].items()}
        seconds = {str(k): (float(a), float(b)) for k, (a, b) in data["seconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{path}: a damaged tuning file: {one_line(e)}") from None
    for name, here in vars(kind).items():
        if (there := getattr(found, name)) != here:
            raise UsageError(f"{path} is for {name} {there!r}; here it is {here!r}")
    return Tuning(kind, ways, seconds)


def _checked(way: Any) -> Way:
    from tinygrad.codegen.opt import OptOps

    for op, axis, arg in way:
        if op not in OptOps.__members__ or not isinstance(axis, int | None):
            raise ValueError(f"unknown optimisation {op!r} on axis {axis!r}")
        if not isinstance(arg, int | list | None):
            raise ValueError(f"unknown argument {arg!r} of {op}")
    return [tuple(one) for one in way]


def _path(kind: Kind) -> Path:
    name = hashlib.sha256(json.dumps(vars(kind)).encode()).hexdigest()[:16]
    return compiler.cache_dir() / f"tuning-{name}.json"


def _seconds(sink: Any, buffers: list[Any], var_vals: dict[str, int]) -> float:
    from tinygrad.engine.realize import time_call
    from tinygrad.uop.ops import UOp

    timer = time_call(sink.call(*[UOp.from_buffer(b) for b in buffers]), var_vals)
    return min(next(timer) for _ in range(_TIMES))


@contextlib.contextmanager
def _before_compiling(choose: Callable[[list[Any]], dict[Any, Way]]) -> Iterator[None]:
    """Have `choose` say the way of each kernel that tinygrad is about to compile."""
    from tinygrad.engine import realize

    module: Any = realize
    compile = module.lower_and_compile
    is_inside = False

    def wrapped(linear: Any) -> Any:
        nonlocal is_inside
        if is_inside:  # what the search itself compiles
            return compile(linear)
        calls = [u for u in linear.toposort() if u.op.name == "CALL" and u.src[0].op.name == "SINK"]
        sinks = list(dict.fromkeys(c.src[0] for c in calls if c.src[0].arg.opts_to_apply is None))
        is_inside = True
        try:
            ways = {sink: way for sink, way in choose(sinks).items() if way}
        finally:
            is_inside = False
        new = {
            call: call.replace(src=(with_way(call.src[0], ways[call.src[0]]), *call.src[1:]))
            for call in calls
            if call.src[0] in ways
        }
        return compile(linear.substitute(new, name="tuned kernels") if new else linear)

    module.lower_and_compile = wrapped
    try:
        yield
    finally:
        module.lower_and_compile = compile
