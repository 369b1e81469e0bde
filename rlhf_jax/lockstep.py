"""Replicas of a run, each in a thread of its own, that make their compiled calls together.

One replica runs at a time. At a call of a `jit` made here it waits until every other one has arrived somewhere; then
those who stand at the earliest place are served: calls of one program become one call, `vmap`ped over the replicas or
made in turns, and what differs is made by itself. So nobody waits for who will not come: a replica that is ahead,
behind, at other shapes or gone changes how fast the others are and not what they compute.

Outside of such a group `jit` is `jax.jit`.
"""

import contextlib
import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent import futures
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

_CURRENT: ContextVar["Replica | None"] = ContextVar("replica", default=None)

_ARRAYS = (jax.Array, np.ndarray, np.generic)

Place = tuple[int, str, int]
"""A stage's number, the name of a function that it compiles, and how many of that name it had compiled before."""

_Key = tuple[Place, Hashable, str]
"""What calls of one program have in common: their place, the types of their arguments, what is compiled."""


def jit(fn: Callable[..., Any], *, donate_argnums: tuple[int, ...] = (), out_shardings: Any = None) -> Callable:
    """`jax.jit`; in a replica a program whose calls, of arguments by position, are made with those of the others."""
    program = jax.jit(fn, donate_argnums=donate_argnums, out_shardings=out_shardings)
    replica = _CURRENT.get()
    if replica is None:
        return program
    made = _Program(replica.place(fn), fn, program, donate_argnums, out_shardings)

    def call(*args: Any) -> Any:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):
            return program(*args)  # a part of another program
        return replica.group.call(_Call(replica, made, args))

    return call


@custom_vmap
def any_replica(x: Bool[Array, "*b"]) -> Bool[Array, ""]:
    """Whether any is true; under `vmap` in any replica, so that a loop that ends by it goes on for all alike."""
    return jnp.any(x)


@any_replica.def_vmap
def _any_of_all(axis_size: int, in_batched: list[bool], x: Bool[Array, "r *b"]) -> tuple[Bool[Array, ""], bool]:
    del axis_size, in_batched
    return any_replica(x), False


def current() -> "Replica | None":
    """The replica whose thread this is."""
    return _CURRENT.get()


@dataclass(eq=False)
class Replica:
    """One of a group."""

    label: str
    group: "Group" = field(init=False, repr=False)
    stage: int = field(default=-1, init=False)
    _made: Counter[str] = field(default_factory=Counter, init=False)
    _turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0), init=False)

    def enter(self, stage: int) -> None:
        """Programs made from now on are the stage's, by its number."""
        self.stage, self._made = stage, Counter()
        self.group.forget()

    def place(self, fn: Callable[..., Any]) -> Place:
        """Where a program of this function stands: the same one in every replica that came here the same way."""
        name = f"{fn.__module__}.{fn.__qualname__}"
        self._made[name] += 1
        return self.stage, name, self._made[name]

    @property
    def speaks(self) -> bool:
        """Whether its progress is the one that is shown: that of the first replica which still runs."""
        return next(iter(self.group.running)) is self


@dataclass(eq=False)
class _Program:
    """A replica's own."""

    place: Place
    fn: Callable[..., Any]
    own: Any  # jitted
    donate_argnums: tuple[int, ...]
    out_shardings: Any


@dataclass(eq=False)
class _Call:
    replica: Replica
    program: _Program
    args: tuple
    outcome: Any = None
    error: BaseException | None = None
    made: bool = False

    def __post_init__(self) -> None:
        self.leaves, tree = jax.tree.flatten(self.args)
        types = ((x.shape, x.dtype) if isinstance(x, _ARRAYS) else (type(x), x) for x in self.leaves)
        self.shape: Hashable = tree, tuple(types)  # what a compiled program is for


class _ErrorOf(contextlib.AbstractContextManager):
    """What is raised inside is to be raised where these calls were made."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        self._calls = calls

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        for call in self._calls:
            call.error = error
        return isinstance(error, Exception)


class Group:
    """Replicas that go in step, as `work` of each takes them."""

    def __init__(self, replicas: Sequence[Replica], *, vmapped: bool) -> None:
        """`vmapped`: calls of one program are made at once; else in turns, by one program for all."""
        self.running: dict[Replica, None] = dict.fromkeys(replicas)
        self.asked: int | None = None  # the signal to stop at, the same for all that stand at a call
        self.counts: Counter[str] = Counter()  # calls by how they were made: "mapped" or "alone"
        self.signal: int | None = None
        self._vmapped, self._at_once = vmapped, False
        self._ready = deque(replicas)
        self._arrived: dict[Replica, _Call] = {}
        self._waiting: dict[Replica, Callable[[], bool]] = {}
        self._order: dict[Place, int] = {}
        self._identities: dict[Hashable, str] = {}
        self._programs: dict[_Key, _Program] = {}
        self._mapped: dict[tuple[_Key, int, tuple[bool, ...]], Callable[..., Any]] = {}
        for replica in replicas:
            replica.group = self

    def run(self, work: Callable[[Replica], Any]) -> dict[Replica, BaseException | None]:
        """Let all work; what each one's work has raised."""

        def own(replica: Replica) -> None:
            replica._turn.acquire()
            _CURRENT.set(replica)
            try:
                work(replica)
            finally:
                del self.running[replica]
                self._next()

        with futures.ThreadPoolExecutor(len(self.running)) as threads:
            working = {replica: threads.submit(own, replica) for replica in list(self.running)}
            self._next()
        return {replica: future.exception() for replica, future in working.items()}

    def forget(self) -> None:
        """Let go of the programs of stages that all have left."""
        first = min(replica.stage for replica in self.running)
        self._programs = {key: made for key, made in self._programs.items() if key[0][0] >= first}
        self._mapped = {key: made for key, made in self._mapped.items() if key[0][0][0] >= first}

    def stop(self, number: int) -> None:
        """By a signal: after the step that all are in; asked twice, each at its next call."""
        self._at_once, self.signal = self.signal is not None, number

    def call(self, call: _Call) -> Any:
        """Make a call when all have arrived."""
        self._arrived[call.replica] = call
        self._give_way(call.replica)
        if not call.made:  # all stand somewhere, and this is the first call of those that are due
            self._make(self._due())
        if call.error is not None:
            raise call.error
        return call.outcome

    def wait_until(self, replica: Replica, condition: Callable[[], bool]) -> None:
        """Stand aside until it holds; who makes it hold must be of the group, and running."""
        if not condition():
            self._waiting[replica] = condition
            self._give_way(replica)

    def _give_way(self, replica: Replica) -> None:
        self._next()
        replica._turn.acquire()
        if self._at_once:
            self._arrived.pop(replica, None)
            raise KeyboardInterrupt(self.signal)

    def _next(self) -> None:
        """Give the turn to who can go on; where nobody can, to who makes the calls that are due."""
        for replica in [one for one, condition in self._waiting.items() if self._at_once or condition()]:
            del self._waiting[replica]
            self._ready.append(replica)
        if not self._ready and self._arrived:
            self.asked = self.signal
            self._ready.append(self._due()[0].replica)
        if self._ready:
            self._ready.popleft()._turn.release()

    def _due(self) -> list[_Call]:
        """The calls at the earliest place at which anybody stands: a stage's places are in the order of first calls."""
        for call in self._arrived.values():
            self._order.setdefault(call.program.place, len(self._order))
        first = min((c.program.place for c in self._arrived.values()), key=lambda p: (p[0], self._order[p]))
        return [call for call in self._arrived.values() if call.program.place == first]

    def _make(self, calls: list[_Call]) -> None:
        """Make them, in the thread of the first one: calls of one place have the same surroundings."""
        same: dict[_Key, list[_Call]] = {}
        for call in calls:
            with _ErrorOf([call]):  # it may be one that cannot be compiled
                same.setdefault((call.program.place, call.shape, self._identity(call)), []).append(call)
        # Of some of the replicas no call is made together: another number of them is another program to compile.
        together = self._vmapped and len(calls) == len(self._arrived)
        for key, few in same.items():
            self._serve(key, few, together=together)
        for call in calls:
            call.made = True
            del self._arrived[call.replica]
        self._ready.extend(call.replica for call in calls[1:])

    def _serve(self, key: _Key, calls: list[_Call], *, together: bool) -> None:
        """Make calls of one program; an error is of all whose call it was."""
        program = self._programs.setdefault(key, calls[0].program)
        common = tuple(
            all(x is xs[0] or not isinstance(x, _ARRAYS) for x in xs)
            for xs in zip(*(call.leaves for call in calls), strict=True)
        )
        if together and len(calls) > 1 and not all(common):
            mapped = key, len(calls), common
            if mapped not in self._mapped:
                self._mapped[mapped] = _mapped(program, calls[0].args, common, len(calls))
            attempts = [(calls, lambda: self._mapped[mapped]([call.leaves for call in calls]))]
        else:
            attempts = [([call], lambda call=call: [program.own(*call.args)]) for call in calls]
        self.counts["mapped" if len(attempts) < len(calls) else "alone"] += len(calls)
        for whose, attempt in attempts:
            with _ErrorOf(whose):
                for call, outcome in zip(whose, attempt(), strict=True):
                    call.outcome = outcome

    def _identity(self, call: _Call) -> str:
        """Of the program as it is compiled: what its function closes over is in it, as constants."""
        key = call.replica, call.program.place, call.shape
        if key not in self._identities:
            text = call.program.own.lower(*call.args).as_text()
            self._identities[key] = hashlib.sha256(text.encode()).hexdigest()
        return self._identities[key]


def _mapped(
    program: _Program, args: tuple, common: tuple[bool, ...], n: int
) -> Callable[[Sequence[Sequence[Any]]], list[Any]]:
    """A program of n replicas' leaves of the arguments, to n outcomes; `common` leaves are one object in all of them.

    It stacks what comes in and parts what goes out, so that between calls everybody has arrays of its own: two copies
    of a state a call, which is little beside a step.
    """
    tree = jax.tree.structure(args)
    donated = [number in program.donate_argnums for number, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    kinds = [2 if shared else 0 if gone else 1 for shared, gone in zip(common, donated, strict=True)]

    def one(*sorts: list[Any]) -> Any:
        leaves = [iter(sort) for sort in sorts]
        return program.fn(*tree.unflatten([next(leaves[kind]) for kind in kinds]))

    def all_of_them(given: list[list[Any]], kept: list[list[Any]], shared: list[Any]) -> list[Any]:
        stacked = ([jnp.stack(xs) for xs in zip(*rows, strict=True)] for rows in (given, kept))
        outcome = jax.vmap(one, in_axes=(0, 0, None))(*stacked, shared)
        return [jax.tree.map(lambda x, i=i: x[i], outcome) for i in range(n)]

    layout = None if program.out_shardings is None else [program.out_shardings] * n
    compiled = jax.jit(all_of_them, donate_argnums=0, out_shardings=layout)

    def of(rows: Sequence[Sequence[Any]], kind: int) -> list[list[Any]]:
        return [[x for x, sort in zip(row, kinds, strict=True) if sort == kind] for row in rows]

    return lambda rows: compiled(of(rows, 0), of(rows, 1), of(rows[:1], 2)[0])
