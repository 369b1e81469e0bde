"""Replicas in step: each has what it would have alone, whatever the others do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lockstep
from rlhf_jax.lockstep import Group, Replica


def together(works, *, vmapped=True):
    """The group, and what each of some functions of a replica gives; an error is raised."""
    replicas = [Replica(str(number)) for number in range(len(works))]
    group, found = Group(replicas, vmapped=vmapped), {}

    def work(replica):
        found[replica] = works[int(replica.label)](replica)

    outcomes = group.run(work)
    for error in outcomes.values():
        if error is not None:
            raise error
    return group, [found[replica] for replica in replicas]


def alone(works):
    return [work(None) for work in works]


def training(seed, rate, steps=3, slope=2.0):
    """A state of a key, a count and weights, taken some steps; `slope` is a constant of the program."""

    def work(replica):
        def step(state, batch, base):
            noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), (4,))
            w = state["w"] - state["rate"] * (slope * state["w"] * base + batch @ noise)
            return {**state, "w": w, "step": state["step"] + 1}, {"norm": jnp.sum(w**2)}

        program = lockstep.jit(step, donate_argnums=(0,))
        state = {
            "key": jax.random.key(seed), "step": jnp.int32(0), "w": jnp.ones(4) * seed, "rate": jnp.float32(rate)
        }  # fmt: skip
        norms = []
        for turn in range(steps):
            state, metrics = program(state, np.full((4, 4), turn + seed, np.float32), 3)
            norms.append(float(metrics["norm"]))
        return norms

    return work


@pytest.mark.parametrize("vmapped", [True, False])
def test_seeds_and_numbers_of_the_state_are_one_program(vmapped):
    works = [training(seed, rate) for seed in (1, 2) for rate in (0.1, 0.01)]
    group, found = together(works, vmapped=vmapped)
    np.testing.assert_allclose(found, alone(works), rtol=1e-5)
    assert len({tuple(norms) for norms in found}) == 4
    assert group.counts == ({"mapped": 12} if vmapped else {"alone": 12})


@pytest.mark.parametrize("vmapped", [True, False])
def test_what_is_compiled_in_is_nobody_elses(vmapped):
    """Two constants, two seeds each: a program for each constant, its seeds at once."""
    works = [training(seed, 0.1, slope=slope) for slope in (1.0, 2.0) for seed in (1, 2)]
    group, found = together(works, vmapped=vmapped)
    np.testing.assert_allclose(found, alone(works), rtol=1e-5)
    assert group.counts == ({"mapped": 12} if vmapped else {"alone": 12})
    group, found = together(works[1:3], vmapped=vmapped)
    np.testing.assert_allclose(found, alone(works[1:3]), rtol=1e-5)
    assert group.counts == {"alone": 6}


def test_who_is_ahead_waits_and_who_is_gone_is_not_waited_for():
    works = [training(seed, 0.1, steps=steps) for seed, steps in enumerate((2, 5, 5), start=1)]
    group, found = together(works)
    np.testing.assert_allclose(found[0], alone(works)[0], rtol=1e-5)
    np.testing.assert_allclose(found[1:], alone(works)[1:], rtol=1e-5)
    assert group.counts == {"mapped": 12}


def sampling(draws):
    """Two programs in turn, the first of them as often as `draws` says, as where groups are drawn again."""

    def work(replica):
        sample = lockstep.jit(lambda x: jnp.cos(x) + 1)
        learn = lockstep.jit(lambda x, y: jnp.tanh(x + y.sum()))
        x = jnp.arange(3.0) + len(draws)
        for number in draws:
            y = x
            for _ in range(number):
                y = sample(y)
            x = learn(x, y)
        return x.tolist()

    return work


def test_calls_beyond_the_others_are_made_first_and_all_meet_again():
    works = [sampling((1, 3, 1)), sampling((1, 1, 2)), sampling((1, 1, 1))]
    group, found = together(works)
    np.testing.assert_allclose(found, alone(works), rtol=1e-5)
    assert group.counts == {"mapped": 9 + 9, "alone": 3}


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_calls_ends_and_gives_what_it_gives_alone(seed):
    """Programs, shapes, stages and lengths at random, nothing of them the same in all."""
    rng = np.random.default_rng(seed)
    plans = [rng.integers(0, 3, (rng.integers(1, 6), 2)).tolist() for _ in range(4)]
    functions = [lambda x: x * 2 + 1, lambda x: jnp.sin(x), lambda x: x - x.sum()]

    def walk(plan):
        def work(replica):
            programs, total = [lockstep.jit(one) for one in functions], 0.0
            for which, size in plan:
                if replica is not None and which == 2:
                    replica.enter(replica.stage + 1)
                total += float(programs[which](jnp.arange(2.0 + size) + total).sum())
            return total

        return work

    works = [walk(plan) for plan in plans]
    np.testing.assert_allclose(together(works)[1], alone(works), rtol=1e-5)


def test_an_error_of_one_is_its_own():
    def broken(replica):
        training(1, 0.1, steps=1)(replica)
        raise ArithmeticError("not finite")

    works = [training(2, 0.1), broken, training(3, 0.1)]
    replicas = [Replica(str(number)) for number in range(3)]
    found = {}
    outcomes = Group(replicas, vmapped=True).run(lambda one: found.update({one.label: works[int(one.label)](one)}))
    assert [type(outcomes[one]) for one in replicas] == [type(None), ArithmeticError, type(None)]
    np.testing.assert_allclose([found["0"], found["2"]], alone([works[0], works[2]]), rtol=1e-5)


def test_a_program_that_cannot_be_compiled_is_an_error_of_all_that_call_it():
    def work(replica):
        return lockstep.jit(lambda x: x @ x)(jnp.ones((2, 3)))

    replicas = [Replica(str(number)) for number in range(2)]
    outcomes = Group(replicas, vmapped=True).run(work)
    assert all(isinstance(error, TypeError) for error in outcomes.values())


def test_a_signal_is_seen_by_all_after_the_same_step():
    def work(replica):
        program, steps = lockstep.jit(lambda x: x + 1), 0
        while replica.group.asked is None:
            program(jnp.float32(steps))
            steps += 1
            if steps == 3 and replica.label == "1":
                replica.group.stop(15)
        return steps

    assert together([work] * 3)[1] == [4, 4, 4]


def test_a_second_signal_ends_all_at_their_next_call():
    def work(replica):
        program = lockstep.jit(lambda x: x + 1)
        for step in itertools.count():
            if step == 2 and replica.label == "0":
                replica.group.stop(2)
                replica.group.stop(2)
            program(jnp.float32(step))

    replicas = [Replica(str(number)) for number in range(3)]
    outcomes = Group(replicas, vmapped=True).run(work)
    assert all(isinstance(error, KeyboardInterrupt) and error.args == (2,) for error in outcomes.values())


def test_who_waits_for_another_goes_on_when_it_is_done_or_gone():
    order = []

    def first(replica):
        training(1, 0.1)(replica)
        order.append("first")

    def second(replica):
        owner = next(iter(replica.group.running))
        replica.group.wait_until(replica, lambda: owner not in replica.group.running)
        order.append("second")

    together([first, second])
    assert order == ["first", "second"]


def test_groups_beside_each_other_go_at_their_own_pace_and_wait_for_each_other():
    """Two groups of two: in each one waits for what the other group's does last, so that neither may hold its turn."""
    done, found = {}, {}
    works = {str(seed): training(seed, 0.1, steps=seed) for seed in (2, 3, 4, 5)}

    def work(replica):
        if replica.label in ("2", "4"):
            other = {"2": "5", "4": "3"}[replica.label]
            replica.group.wait_until(replica, lambda: other in done)
        found[replica.label] = works[replica.label](replica)
        done[replica.label] = True

    pairs = [Group([Replica(a), Replica(b)], vmapped=False) for a, b in (("2", "3"), ("4", "5"))]
    outcomes = lockstep.beside(pairs, work)
    assert set(outcomes.values()) == {None} and len(outcomes) == 4
    for seed, one in works.items():
        np.testing.assert_allclose(found[seed], one(None), rtol=1e-5)


def test_of_groups_beside_each_other_the_first_that_runs_speaks():
    before, after = {}, {}

    def work(replica):
        if replica is first:
            replica.group.wait_until(replica, lambda: len(before) == 2)
        else:
            before[replica.label] = replica.speaks
            replica.group.wait_until(replica, lambda: first not in first.group.running)
            after[replica.label] = replica.speaks

    first, *others = (Replica(label) for label in "abc")
    lockstep.beside([Group([first], vmapped=False), Group(others, vmapped=False)], work)
    assert before == {"b": False, "c": False}
    assert after == {"b": True, "c": True}  # c when b is gone


def test_a_loop_that_ends_by_all_leaves_each_its_own():
    """The oracle is the loop of each one; the mapped loop's condition is one number, so that nothing is selected."""

    def loop(counts):
        def body(carry):
            turn, left, total = carry
            return turn + 1, jnp.maximum(left - 1, 0), total + jnp.where(left > 0, turn, 0)

        return jax.lax.while_loop(lambda carry: lockstep.any_replica(carry[1] > 0), body, (0, counts, 0 * counts))[2]

    counts = jnp.asarray([[1, 4, 2], [0, 0, 1]])
    np.testing.assert_array_equal(jax.vmap(loop)(counts), [loop(row) for row in counts])
    np.testing.assert_array_equal(loop(counts[0]), [0, 6, 1])
    text = str(jax.make_jaxpr(jax.vmap(loop))(counts))
    assert "cond_jaxpr" in text and "bool[2]" not in text


def test_outside_of_a_group_it_is_jit():
    program = lockstep.jit(lambda x: x + 1, donate_argnums=(0,))
    assert type(program) is type(jax.jit(lambda x: x))
    x = jnp.ones(3)
    program(x)
    assert x.is_deleted()
