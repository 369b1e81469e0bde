"""A model behind an OpenAI-compatible endpoint: its answers, kept on the disk, asked for again while it is away.

This file imports neither JAX nor NumPy: it is loaded by the process that rewards run in, too.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.posting import post

_AGAIN = (408, 409, 425, 429)  # statuses of a request that may succeed later, besides 500 and above
_LONGEST_PAUSE = 60.0  # seconds
_PER = 1_000_000  # tokens that a price is for


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, how long an answer may take, what it costs."""

    url: str
    """The API's address, such as "http://localhost:8000/v1"."""
    model: str
    """The model's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; where it is not set, none is sent."""
    seconds: float = 60.0
    """Longest time for an answer, to its last byte."""
    retries: int = 5
    """Further attempts after one that found nobody, came late, or was told to come later (408, 409, 425, 429, 500 and
    above)."""
    pause: float = 1.0
    """Seconds before the first of them; each later one waits twice as long, and as long as the endpoint asks for."""
    parallel: int = 8
    """Requests under way at once."""
    price_in: float = 0.0
    """Dollars a million tokens of questions, for the count of costs."""
    price_out: float = 0.0
    """Dollars a million tokens of answers."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint.url must begin with http:// or https://, got {self.url!r}")
        for name in ("seconds", "pause"):
            if not 0 < vars(self)[name] < math.inf:
                raise ValueError(f"endpoint.{name} must be over 0 and finite, got {vars(self)[name]}")
        for name, least in (("retries", 0), ("parallel", 1), ("price_in", 0), ("price_out", 0)):
            if not least <= vars(self)[name] < math.inf:
                raise ValueError(f"endpoint.{name} must be at least {least}, got {vars(self)[name]}")


@dataclass(frozen=True)
class Question:
    """What a model is asked: one turn of a user."""

    text: str
    max_tokens: int = 1
    """Most tokens of the answer."""
    top_logprobs: int = 0
    """How many of the likeliest first tokens are wanted with their log-probs."""

    def body(self, model: str) -> dict[str, Any]:
        """As the API has it; at temperature 0."""
        asked: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        return asked | ({"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {})


@dataclass(frozen=True)
class Answer:
    """What it said."""

    text: str
    logprobs: Mapping[str, float] = field(default_factory=dict)
    """Of the first token's likeliest alternatives, where the endpoint gives them."""
    tokens_in: int = 0
    tokens_out: int = 0


class Client:
    """Answers to questions; each is kept in a file and never asked for twice.

    Raises UserError, one line, for a key that cannot be one, and where the endpoint refuses, answers in another
    language than the API's, or cannot be reached within its retries; what was answered before is kept, so that the same
    command goes on.
    """

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        """`cache` is a file of JSON lines; a last line that a killed process left incomplete is dropped."""
        self._endpoint, self._path, self._lock = endpoint, cache, threading.Lock()
        self._key = _key(endpoint.api_key_env)
        self._known: dict[str, Answer] = {}
        if cache.exists():
            lines = cache.read_text(encoding="utf-8").split("\n")
            self._known = dict(_stored(line) for line in lines[:-1])
            if lines[-1]:
                with cache.open("r+", encoding="utf-8") as file:
                    file.truncate(len("".join(f"{line}\n" for line in lines[:-1]).encode()))

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order; equal ones are asked once."""
        with ThreadPoolExecutor(self._endpoint.parallel) as threads:
            futures = {question: threads.submit(self._answer, question) for question in dict.fromkeys(questions)}
            try:
                return [futures[question].result() for question in questions]
            finally:
                threads.shutdown(cancel_futures=True)

    def costs(self) -> dict[str, float]:
        """All answers in the file, their tokens, and their price in dollars."""
        found = list(self._known.values())
        used, made = (sum(getter) for getter in ((a.tokens_in for a in found), (a.tokens_out for a in found)))
        dollars = (used * self._endpoint.price_in + made * self._endpoint.price_out) / _PER
        return {"judge_requests": len(found), "judge_tokens": used + made, "judge_dollars": dollars}

    def _answer(self, question: Question) -> Answer:
        body = question.body(self._endpoint.model)
        key = hashlib.sha256(json.dumps([self._endpoint.url, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            return known
        answer = _read(self._ask(body), self._endpoint.url)
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **vars(answer)}, ensure_ascii=False) + "\n")
            self._known[key] = answer
        return answer

    def _ask(self, body: dict[str, Any]) -> Any:
        """The endpoint's JSON, after as many attempts as it takes and may be made."""
        e = self._endpoint
        address, pause = f"{e.url.rstrip('/')}/chat/completions", e.pause
        for attempt in range(e.retries + 1):
            status, said, asks_for = post(address, body, self._key, e.seconds)
            if status == 200:
                try:
                    return json.loads(said)
                except ValueError:
                    raise UserError(f"endpoint.url: {address} answers with what is no JSON: {said[:80]!r}") from None
            if status is not None and status < 500 and status not in _AGAIN:
                raise UserError(f"endpoint.url: {address} answers {status}: {' '.join(said.split())[:200]}")
            if attempt < e.retries:
                time.sleep(min(max(pause, asks_for), _LONGEST_PAUSE))
                pause *= 2
        what = f"answers {status}: {' '.join(said.split())[:100]}" if status else f"cannot be reached ({said})"
        raise UserError(
            f"endpoint.url: {address} {what}, {e.retries + 1} times in a row; the answers so far are in {self._path}, "
            "and the same command goes on"
        )


def _key(variable: str) -> str:
    """What an environment variable holds, without the line break that a file of it ends in; never shown."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"endpoint.api_key_env: the environment variable {variable} holds what no HTTP header can: it must be one "
            "line of printable ASCII"
        )
    return key


def _read(reply: Any, url: str) -> Answer:
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        logprobs = {one["token"]: float(one["logprob"]) for one in listed}
        text = choice["message"]["content"] or ""
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        told = json.dumps(reply, ensure_ascii=False)[:120]
        raise UserError(f"endpoint.url: {url} does not answer as chat/completions does: {told}") from None
    return Answer(text, logprobs, *counts)


def _stored(line: str) -> tuple[str, Answer]:
    fields = json.loads(line)
    return fields.pop("key"), Answer(**fields)
