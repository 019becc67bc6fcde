"""Chat templates, run by jinja2 in its sandbox, with the names that those written for transformers expect."""

from __future__ import annotations

import datetime
import functools
import json
import time
from contextvars import ContextVar
from typing import Any, NoReturn

LONGEST, SECONDS = 10_000_000, 5.0
"""Number of characters that a template may write, and of seconds that it may take: jinja2's sandbox bounds neither."""

_deadline: ContextVar[float] = ContextVar("_deadline")


def rendered(template: str, names: dict[str, Any]) -> str:
    """Return what a template writes, given some names; raise jinja2.TemplateSyntaxError where it does not compile.

    It may raise whatever a program can; TimeoutError and OverflowError say that it has left its bounds.
    """
    _deadline.set(time.monotonic() + SECONDS)
    written = ""
    for piece in _compiled(template).generate(**names):
        written += piece
        if len(written) > LONGEST:
            raise OverflowError(f"it writes more than {LONGEST:,} characters")
    return written


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """An extension that passes over {% generation %} ... {% endgeneration %}, which marks text for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def tick(self) -> None:
            if time.monotonic() > _deadline.get():
                raise TimeoutError(f"it takes more than {SECONDS:.0f} seconds")

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # jinja2's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    parsed = environment.parse(template)
    for loop in parsed.find_all(nodes.For):
        # An attribute of the environment, which no name that the template sets can hide.
        loop.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)))
    return environment.from_string(parsed)
