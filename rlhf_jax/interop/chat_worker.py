"""The process in which chat templates run: jinja2's sandbox inside limits of memory and processor time.

A template comes with a model from anywhere. The sandbox keeps it from attributes; only a process of its own keeps a
loop or a huge string from taking the program's time and memory. The protocol is a line of JSON each way:

    {"source", "variables", "conversations": [{"messages", "add_generation_prompt"}, …], "marked"}
    {"texts": […], "spans": [[begin, end], …] or null}  or  {"error": "…"}

`spans`, asked for by `marked`, is where {% generation %} blocks stand in the first text. This file is run by itself and
imports nothing of the package.
"""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 2**30
"""Bytes of address space."""
LONGEST = 2**25
"""Characters of one rendered conversation."""

# What Python's operators and methods raise in a template, besides what is answered for by name.
_RAISED = (jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError,
           TypeError, ValueError)  # fmt: skip


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: what the assistant says, with marks around it when they are asked for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _say(self, caller: Callable[[], str]) -> str:
        return f"{_mark[0]}({caller()}{_mark[0]})" if _mark else caller()


_mark: list[str] = []
"""What stands around generation blocks; empty, nothing."""


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """As transformers has it: unlike jinja2's own it leaves <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment.from_string(source)


def _render(template: jinja2.Template, variables: dict[str, Any], conversation: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in template.generate({**variables, **conversation}):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise MemoryError
    return "".join(parts)


def _marked_spans(template: jinja2.Template, variables: dict[str, Any], conversation: dict[str, Any], text: str) -> Any:
    """Where generation blocks stand in `text`; None unless the text with marks is the text but for them."""
    mark = f"\x02{os.urandom(8).hex()}"
    _mark.append(mark)
    try:
        marked = _render(template, variables, conversation)
    finally:
        _mark.clear()
    pieces = re.split(re.escape(mark) + r"([()])", marked)
    if "".join(pieces[::2]) != text:
        return None
    spans, at, begin = [], 0, None
    for piece, kind in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        at += len(piece)
        if kind == "(":
            begin = at
        elif kind == ")" and begin is not None:
            spans.append((begin, at))
            begin = None
    return spans


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request; whatever goes wrong in a template is its {"error": "…"}."""
    try:
        template, variables = _compiled(request["source"]), request["variables"]
        texts = [_render(template, variables, conversation) for conversation in request["conversations"]]
        spans = None
        if request["marked"]:
            spans = _marked_spans(template, variables, request["conversations"][0], texts[0])
        return {"texts": texts, "spans": spans}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"reaches for what a template may not have ({error})"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error}"}
    except MemoryError:
        return {"error": "makes more text than it may"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except _RAISED as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # as far as the system can
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """The system ends the process after so many more seconds at work."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds + 1, hard))


def main() -> None:
    """Answer requests until there are no more; the argument is the seconds that each may be at work."""
    seconds = int(sys.argv[1])
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time(seconds)
        reply = answer(json.loads(line))
        if "error" in reply:
            reply["error"] = reply["error"].encode(errors="replace").decode()[:300]
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
