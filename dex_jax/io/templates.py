"""Templates that others wrote: jinja2 in a sandbox, with what those written for transformers expect, within bounds."""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn

LONGEST = 10_000_000
"""Characters, or elements, that a template may make of anything."""

SECONDS = 5.0
"""How long it may take. jinja2's sandbox keeps templates from the machine, and not from taking its time and memory."""

_WIDE = re.compile(r"\d{6}|%[^a-z]*\*")
_deadline: ContextVar[float] = ContextVar("_deadline")


def rendered(template: str, names: dict[str, Any]) -> str:
    """What a template writes, given some names; a jinja2.TemplateSyntaxError where it does not compile.

    Otherwise whatever a program can raise; TimeoutError and OverflowError where it leaves its bounds.
    """
    _deadline.set(time.monotonic() + SECONDS)
    pieces, size = [], 0
    for piece in _compile(template).generate(**names):
        size += len(piece)
        _bounded(size)
        pieces.append(piece)
    return "".join(pieces)


def _bounded(*sizes: Any) -> None:
    if any(isinstance(size, int) and abs(size) > LONGEST for size in sizes):
        raise OverflowError(f"it asks for more than {LONGEST:,} characters")


def _modest(text: Any) -> None:
    """Raises OverflowError for a format string that pads to some great width."""
    if isinstance(text, str) and _WIDE.search(text):
        raise OverflowError("it asks for a field of great width")


def _bounded_filter(filter: Callable) -> Callable:
    @functools.wraps(filter)
    def bounded(*args: Any, **options: Any) -> Any:
        _bounded(*args, *options.values())
        if filter.__name__ == "do_format":
            _modest(args[0])
        return filter(*args, **options)

    return bounded


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Generation(jinja2.ext.Extension):
        """Lets {% generation %} ... {% endgeneration %}, which marks text for training, pass through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Looks at every operation that can make something large of something small."""

        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
            if operator == "%":
                _modest(left)
            elif all(isinstance(size, int) for size in sizes):
                if sizes != [left, right]:
                    _bounded(sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
                elif operator == "**" or max(size.bit_length() for size in sizes) > 64:
                    _bounded(*sizes, left.bit_length() * right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, *args: Any, **options: Any) -> Any:
            _bounded(*args, *options.values())
            if getattr(called, "__name__", "") in ("format", "format_map"):
                _modest(getattr(getattr(called, "__wrapped__", called), "__self__", None))
            return super().call(context, called, *args, **options)

        def joined(self, *parts: Any) -> str:
            texts = [str(part) for part in parts]
            _bounded(sum(map(len, texts)))
            return "".join(texts)

        def tick(self) -> None:
            if time.monotonic() > _deadline.get():
                raise TimeoutError(f"it takes more than {SECONDS:.0f} seconds")

    def call(name: str, *args: Any) -> nodes.Call:
        # An attribute of the environment, which no name that the template sets can hide.
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    class Watch(NodeTransformer):
        """Has every loop look at the clock, and every ~ at what it joins."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(call("tick")))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return call("joined", *node.nodes)

    _bounded(len(template.encode()))
    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _bounded_filter(each) for name, each in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    code = environment.compile(Watch().visit(environment.parse(template)))
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
