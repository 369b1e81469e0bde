"""Replicas of a run, each in a thread of its own, that make their compiled calls together.

One replica runs at a time. At a call of a `jit` made here it waits until every other one has arrived somewhere; then
those who stand at the earliest place are served: calls of one program become one call, `vmap`ped over the replicas or
made in turns, and what differs is made by itself. So nobody waits for who will not come: a replica that is ahead,
behind, at other shapes or gone changes how fast the others are and not what they compute.

Replicas may have devices of their own (`Spread`): a `vmap`ped call is then one program over all of these, the replicas'
axis split over their groups. Where calls are made in turns, the replicas of each group of devices are a group of their
own here, and the groups go beside each other (`beside`), each replica in step with those of its devices alone.

Outside of such a group `jit` is `jax.jit`.
"""

import contextlib
import hashlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent import futures
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

_CURRENT: ContextVar["Replica | None"] = ContextVar("replica", default=None)
NAME: ContextVar["Name | None"] = ContextVar("name", default=None)
"""Of a run that is by itself in its process, and one of several beside it."""

_ARRAYS = (jax.Array, np.ndarray, np.generic)

Place = tuple[int, str, int]
"""A stage's number, the name of a function that it compiles, and how many of that name it had compiled before."""

_Key = tuple[Place, Hashable, str, bool]
"""What calls of one program have in common: their place, the types of their arguments, what is compiled, and whether
the arguments are where a call for several replicas would have them."""


class Spread(Protocol):
    """Groups of devices, each with its share of the replicas."""

    axis: str
    """The mesh axis of the groups."""

    def holds(self, home: int, leaves: Sequence[Any], out_shardings: Any) -> bool:
        """Whether a program of these leaves, called here, is one of a group's own mesh."""
        ...

    def of_all(self, mapped: Callable[..., Any], out_shardings: Any) -> Callable[..., list[Any]]:
        """Compile a function of stacked leaves, (donated, kept, shared), for rows of leaves: one outcome a row.

        `out_shardings` are those of a replica's own program. Rows are in the order of the groups, all with as many.
        """
        ...


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


@dataclass
class Name:
    """A run that is one of several."""

    label: str
    speaks: bool
    """Whether its progress is the one that is shown."""


def name() -> Name | None:
    """That of the run whose thread this is; None where there is one run alone."""
    replica = _CURRENT.get()
    return NAME.get() if replica is None else Name(replica.label, replica.speaks)


def current() -> "Replica | None":
    """The replica whose thread this is."""
    return _CURRENT.get()


@dataclass(eq=False)
class Replica:
    """One of a group."""

    label: str
    home: int = 0
    """Which of a `Spread`'s groups of devices is its."""
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
        return next(one for group in self.group.crews for one in list(group.running)) is self


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
    key: _Key = field(init=False)
    served: bool = False
    alone: bool = False  # to be made by its own replica
    outcome: Any = None
    error: BaseException | None = None

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

    def __init__(self, replicas: Sequence[Replica], *, vmapped: bool, spread: Spread | None = None) -> None:
        """`vmapped`: calls of one program are made at once; else in turns, by one program for all.

        With a `spread` replicas have homes there, each home some.
        """
        self.running: dict[Replica, None] = dict.fromkeys(replicas)
        self.crews: tuple[Group, ...] = (self,)  # all that go beside each other
        self.asked: int | None = None  # the signal to stop at, the same for all that stand at a call
        self.counts: Counter[str] = Counter()  # calls by how they were made: "mapped" or "alone"
        self.signal: int | None = None
        self._vmapped, self._spread, self._at_once = vmapped, spread, False
        self._homes = len({replica.home for replica in replicas})
        self._ready = deque(replicas)
        self._arrived: dict[Replica, _Call] = {}
        self._waiting: dict[Replica, Callable[[], bool]] = {}
        self._order: dict[Place, int] = {}
        self._identities: dict[Hashable, str] = {}
        self._programs: dict[tuple[_Key, int], _Program] = {}  # a home's
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
        self._programs = {key: made for key, made in self._programs.items() if key[0][0][0] >= first}
        self._mapped = {key: made for key, made in self._mapped.items() if key[0][0][0] >= first}

    def stop(self, number: int) -> None:
        """By a signal: after the step that all are in; asked twice, each at its next call."""
        self._at_once, self.signal = self.signal is not None, number

    def call(self, call: _Call) -> Any:
        """Make a call when all have arrived."""
        is_home = self._spread is None or self._spread.holds(call.replica.home, call.leaves, call.program.out_shardings)
        call.key = call.program.place, call.shape, self._identity(call), is_home
        self._arrived[call.replica] = call
        self._give_way(call.replica)
        if not call.served:  # all stand somewhere, and this is the first call of those that are due
            self._serve(self._due())
        if call.alone:
            return self._alone(call)
        if call.error is not None:
            raise call.error
        return call.outcome

    def wait_until(self, replica: Replica, condition: Callable[[], bool]) -> None:
        """Stand aside until it holds; who makes it hold must be of the group or of one beside it, and running."""
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
        self._wake()
        while not self._ready and not self._arrived and self._waiting:  # all for others, of groups beside
            time.sleep(0.05)
            self._wake()
        if not self._ready and self._arrived:
            self.asked = self.signal
            self._ready.append(self._due()[0].replica)
        if self._ready:
            self._ready.popleft()._turn.release()

    def _wake(self) -> None:
        """Let those go on who have what they wait for."""
        for replica in [one for one, condition in self._waiting.items() if self._at_once or condition()]:
            del self._waiting[replica]
            self._ready.append(replica)

    def _due(self) -> list[_Call]:
        """The calls at the earliest place at which anybody stands: a stage's places are in the order of first calls."""
        for call in self._arrived.values():
            self._order.setdefault(call.program.place, len(self._order))
        first = min((c.program.place for c in self._arrived.values()), key=lambda p: (p[0], self._order[p]))
        return [call for call in self._arrived.values() if call.program.place == first]

    def _serve(self, calls: list[_Call]) -> None:
        """Make what is made at once, in the thread of the first: calls of one place have the same surroundings."""
        same: dict[_Key, list[_Call]] = {}
        for call in calls:
            same.setdefault(call.key, []).append(call)
        # Of some of the replicas no call is made together: another number of them is another program to compile.
        together = self._vmapped and len(calls) == len(self._arrived)
        for key, few in same.items():
            if together and len(few) > 1 and self._may_be_mapped(key, few):
                self._made_at_once(key, few)
            else:
                for call in few:
                    call.alone = True
            self.counts["alone" if few[0].alone else "mapped"] += len(few)
        for call in calls:
            call.served = True
            del self._arrived[call.replica]
        self._ready.extend(call.replica for call in calls[1:])

    def _may_be_mapped(self, key: _Key, calls: list[_Call]) -> bool:
        """Whether anything is to be mapped over, on as many replicas of each home."""
        homes = Counter(call.replica.home for call in calls)
        is_even = len(set(homes.values())) == 1 and len(homes) == self._homes
        return key[-1] and is_even and not all(self._common(calls))

    def _common(self, calls: list[_Call]) -> tuple[bool, ...]:
        """Which leaves are one object in all calls; over several homes no array is."""
        return tuple(
            not isinstance(xs[0], _ARRAYS) or (self._spread is None and all(x is xs[0] for x in xs))
            for xs in zip(*(call.leaves for call in calls), strict=True)
        )

    def _made_at_once(self, key: _Key, calls: list[_Call]) -> None:
        """By one call; an error is of all whose call it was."""
        calls = sorted(calls, key=lambda call: call.replica.home)
        common = self._common(calls)
        mapped = key, len(calls), common
        with _ErrorOf(calls):
            if mapped not in self._mapped:
                self._mapped[mapped] = _mapped(calls[0].program, calls[0].args, common, len(calls), self._spread)
            outcomes = self._mapped[mapped]([call.leaves for call in calls])
            for call, outcome in zip(calls, outcomes, strict=True):
                call.outcome = outcome

    def _alone(self, call: _Call) -> Any:
        """Make a call, by the program of the first of its home; go on when the others that are due have made theirs.

        Calls return before their work is done: so devices are not idle while a replica reads what it has got.
        """
        program = self._programs.setdefault((call.key, call.replica.home), call.program)
        try:
            return program.own(*call.args)
        finally:
            self._ready.append(call.replica)
            self._give_way(call.replica)

    def _identity(self, call: _Call) -> str:
        """Of the program as it is compiled: what its function closes over is in it, as constants."""
        key = call.replica, call.program.place, call.shape
        if key not in self._identities:
            text = call.program.own.lower(*call.args).as_text()
            self._identities[key] = hashlib.sha256(text.encode()).hexdigest()
        return self._identities[key]


def beside(groups: Sequence[Group], work: Callable[[Replica], Any]) -> dict[Replica, BaseException | None]:
    """Let all groups work, each in step within itself; what each replica's work has raised."""
    for group in groups:
        group.crews = tuple(groups)
    with futures.ThreadPoolExecutor(len(groups)) as threads:
        working = [threads.submit(group.run, work) for group in groups]
        while futures.wait(working, timeout=0.5).not_done:
            pass  # Python hears a signal that comes as a wait begins when the wait is over
    return {replica: error for future in working for replica, error in future.result().items()}


def _mapped(
    program: _Program, args: tuple, common: tuple[bool, ...], n: int, spread: Spread | None
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

    def of(rows: Sequence[Sequence[Any]], kind: int) -> list[list[Any]]:
        return [[x for x, sort in zip(row, kinds, strict=True) if sort == kind] for row in rows]

    if spread is None:
        compiled = _on_one_mesh(jax.vmap(one, in_axes=(0, 0, None)), n, program.out_shardings)
    else:
        over_groups = jax.vmap(one, in_axes=(0, 0, None), spmd_axis_name=spread.axis)
        compiled = spread.of_all(over_groups, program.out_shardings)
    return lambda rows: compiled(of(rows, 0), of(rows, 1), of(rows[:1], 2)[0])


def _on_one_mesh(mapped: Callable[..., Any], n: int, out_shardings: Any) -> Callable[..., list[Any]]:
    """What `Spread.of_all` says, where all replicas have the same devices."""

    def all_of_them(given: list[list[Any]], kept: list[list[Any]], shared: list[Any]) -> list[Any]:
        stacked = ([jnp.stack(xs) for xs in zip(*rows, strict=True)] for rows in (given, kept))
        outcome = mapped(*stacked, shared)
        return [jax.tree.map(lambda x, i=i: x[i], outcome) for i in range(n)]

    return jax.jit(all_of_them, donate_argnums=0, out_shardings=None if out_shardings is None else [out_shardings] * n)
