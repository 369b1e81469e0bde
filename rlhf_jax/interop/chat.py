"""Chat templates: conversations to text as a model was trained on them, and which of it the assistant says."""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, missing_extra

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS = 10
"""Processor time that one request may take."""

_PATIENCE = 120  # seconds on the clock, for systems that keep no such limit
_LONGEST_SOURCE = 2**20


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja2 template as transformers renders it, in a sandbox in a process of its own."""

    source: str
    """The template."""
    tokens: tuple[tuple[str, str], ...] = ()
    """Special tokens by the names that the template knows, such as ("bos_token", "<s>")."""
    end: str = ""
    """The token that ends an answer, "" for none: nothing after it is learnt."""
    origin: str = "chat template"
    """The file, for messages."""

    def __post_init__(self) -> None:
        if len(self.source) > _LONGEST_SOURCE:
            raise UserError(f"{self.origin}: a chat template of {len(self.source)} characters, too many")

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; with the generation prompt, up to where the assistant's answer begins.

        `variables` are what the template knows besides, such as {"tools": […], "enable_thinking": False}.
        Raises UserError for a template that fails, loops, grows without bounds or reaches for attributes.
        """
        return self._ask([(messages, add_generation_prompt)], variables)["texts"][0]

    def render_spans(self, messages: Messages, *, start: int = 0) -> tuple[str, list[Span]]:
        """The conversation as text, and where in it the assistant's answers stand, from the message `start` on.

        A template's own {% generation %} blocks say so; without them an answer is what the text of the turns up to it
        has more than the text up to its generation prompt, no further than the token that ends it.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        late = [i for i in turns if i >= start]
        if _GENERATION.search(self.source):
            reply = self._ask([(messages, False)], None, marked=True)
            if reply["spans"] is None:
                raise UserError(f"{self.origin}: the chat template changes what its generation blocks hold")
            spans = [(begin, end) for begin, end in reply["spans"]]
            if late != turns and len(spans) != len(turns):
                raise UserError(f"{self.origin}: the chat template has not one generation block for each answer")
            return reply["texts"][0], spans if late == turns else spans[len(turns) - len(late) :]
        turns = late
        parts = [(messages[: i + 1], False) for i in turns] + [(messages[:i], True) for i in turns if i]
        text, *rest = self._ask([(messages, False), *parts], None)["texts"]
        through, before = rest[: len(turns)], rest[len(turns) :]
        if len(before) < len(through):  # nothing before the first answer
            before.insert(0, "")
        return text, [
            self._answer(text, until, upto, messages[i]["content"], i)
            for i, until, upto in zip(turns, before, through, strict=True)
        ]

    def _answer(self, text: str, before: str, through: str, content: str, turn: int) -> Span:
        """Where a turn stands in the whole text, even if the template writes it otherwise once others follow."""
        content = content.strip()
        begin = len(before)
        if not before or not text.startswith(before):
            begin = text.find(content, _shared(text, before)) if content else -1
        end = len(through)
        if not text.startswith(through):
            at, there = text.find(content, max(begin, 0)), through.rfind(content)
            tail = through[there + len(content) :]
            end = at + len(content) + _shared(text[at + len(content) :], tail) if content and at >= 0 <= there else -1
        if begin < 0 or end < begin:
            raise UserError(
                f"{self.origin}: the chat template hides where the assistant's answer, message {turn}, stands"
            )
        last = text.rfind(self.end, begin, end) if self.end else -1
        return begin, last + len(self.end) if last >= 0 else end

    def _ask(self, conversations: list[tuple[Messages, bool]], variables: Any, marked: bool = False) -> dict[str, Any]:
        request = {
            "source": self.source,
            "variables": {"tools": None, "documents": None, **dict(self.tokens), **(variables or {})},
            "conversations": [
                {"messages": [dict(message) for message in messages], "add_generation_prompt": add}
                for messages, add in conversations
            ],
            "marked": marked,
        }
        reply = _worker().ask(json.dumps(request), self.origin)
        if "error" in reply:
            raise UserError(f"{self.origin}: the chat template {reply['error']}")
        return reply


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Worker:
    """The process that renders, started with the first request and again after one that it did not survive."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str, origin: str) -> dict[str, Any]:
        """The worker's reply; UserError where it took too long or too much."""
        with self._lock:
            process = self._process or self._start(origin)
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(_PATIENCE, process.kill)
            timer.start()
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            finally:
                timer.cancel()
            if not line.endswith(b"\n"):
                self.stop()
                raise UserError(f"{origin}: the chat template takes more time or memory than it may")
            return json.loads(line)

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        process.wait()

    def _start(self, origin: str) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("jinja2") is None:
            raise missing_extra("jinja2", origin)
        # -P: the file's own folder has modules with names of packages.
        command = [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py")), str(SECONDS)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        atexit.register(self.stop)
        return self._process


_shared_worker: list[_Worker] = []


def _worker() -> _Worker:
    """One for this process; a fork of it starts its own."""
    if not _shared_worker or _shared_worker[0].owner != os.getpid():
        _shared_worker[:] = [_Worker()]
    return _shared_worker[0]
