"""Replicas over groups of devices: each is its single run, on its group alone; what does not go together is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lockstep, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.lockstep import Group, Replica
from rlhf_jax.plan.collectives import collectives
from rlhf_jax.plan.hlo import parse
from rlhf_jax.replicas import Groups
from rlhf_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")


def together(config, works, *, vmapped=True):
    """The group, and what each of some functions of (replica, mesh) gives, in groups of the first devices."""
    groups = Groups(config, jax.devices()[: config.fixed_devices])
    replicas = [Replica(str(number), number % config.replica) for number in range(len(works))]
    group, found = Group(replicas, vmapped=vmapped, spread=groups), {}

    def work(replica):
        found[replica] = works[int(replica.label)](replica, groups.meshes[replica.home])

    outcomes = group.run(work)
    for error in outcomes.values():
        if error is not None:
            raise error
    return group, [found[replica] for replica in replicas]


def training(seed, steps=3, fails=None):
    """Steps of a layer whose kernel the mesh splits, with noise; norms, and where the state lies at the end."""

    def work(replica, mesh):
        def step(state, x):
            hidden = sharding.constrain(jnp.tanh(x @ state["w"]), "batch", "mlp")
            noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), hidden.shape)
            grad = x.T @ (hidden + noise) / len(x)
            return {**state, "w": state["w"] - 0.1 * grad, "step": state["step"] + 1}, {"norm": jnp.sum(hidden**2)}

        state = {"w": jnp.eye(8) * (1 + seed), "key": jax.random.key(seed), "step": jnp.int32(0)}
        state = {**state, "w": jax.device_put(state["w"], sharding.batch_sharding(mesh))}
        layout = {"w": sharding.batch_sharding(mesh), "key": None, "step": None}
        norms = []
        with sharding.scope(mesh):
            program = lockstep.jit(step, donate_argnums=(0,), out_shardings=(layout, None))
            for turn in range(steps):
                if turn == fails:
                    raise ArithmeticError("not finite")
                batch = np.random.default_rng(seed + turn).normal(size=(4, 8)).astype(np.float32)
                state, metrics = program(state, sharding.shard_batch(mesh, batch))
                assert state["w"].sharding == layout["w"]
                norms.append(float(metrics["norm"]))
        assert set(state["w"].devices()) == set(mesh.devices.flat)
        return norms

    return work


MESHES = [MeshConfig(data=1, replica=4), MeshConfig(data=1, fsdp=2, replica=2), MeshConfig(data=2, tensor=2, replica=2)]


@pytest.mark.parametrize("vmapped", [True, False])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_each_is_its_single_run(config, vmapped):
    works = [training(seed) for seed in range(4)]
    group, found = together(config, works, vmapped=vmapped)
    single = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    np.testing.assert_allclose(found, [work(None, single) for work in works], rtol=1e-5)
    assert len({tuple(norms) for norms in found}) == 4
    assert group.counts == ({"mapped": 12} if vmapped else {"alone": 12})


def test_who_is_left_of_a_group_goes_on_alone():
    """A group with fewer replicas than another has no part in a program of all."""
    works = [training(0, steps=4), training(1, fails=2), training(2, steps=4), training(3, steps=4)]
    groups = Groups(MESHES[1], jax.devices()[:4])
    replicas = [Replica(str(number), number % 2) for number in range(4)]
    group, found = Group(replicas, vmapped=True, spread=groups), {}
    outcomes = group.run(lambda one: found.update({one.label: works[int(one.label)](one, groups.meshes[one.home])}))
    assert [type(outcomes[one]) for one in replicas] == [type(None), ArithmeticError, type(None), type(None)]
    single = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for number in (0, 2, 3):
        np.testing.assert_allclose(found[str(number)], works[number](None, single), rtol=1e-5)
    assert group.counts == {"mapped": 8, "alone": 6}


def test_a_program_of_a_part_of_the_groups_devices_is_made_alone():
    def work(replica, mesh):
        part = make_mesh(MeshConfig(data=1), list(mesh.devices.flat)[1:])
        with sharding.scope(part):
            program = lockstep.jit(lambda x: x + 1, out_shardings=sharding.replicated(part))
            made = program(np.float32(mesh.devices.flat[0].id))
        assert made.devices() == {mesh.devices.flat[1]}
        return float(made)

    group, found = together(MESHES[1], [work] * 2)
    assert found == [1.0, 3.0] and group.counts == {"alone": 2}


def test_nothing_crosses_between_groups():
    """The compiled text of a step with gathers and sums within a group: no exchange is along the replicas' axis."""
    groups = Groups(MESHES[2], jax.devices())

    def step(given, kept, shared):
        del shared
        return jax.vmap(lambda w, x: (w - (x.T @ jnp.tanh(x @ w)), jnp.sum(x)), spmd_axis_name="replica")(
            given[0], kept[0]
        )

    place = sharding.batch_sharding(groups.meshes[0])
    inputs = [
        jax.ShapeDtypeStruct((4, *shape), jnp.float32, sharding=sharding.of_replicas(groups.whole, place))
        for shape in ((8, 8), (4, 8))
    ]
    compiled = groups.compiled(step, (place, None)).lower(inputs[:1], inputs[1:], []).compile()
    exchanges = collectives(parse(compiled.as_text()), groups.whole)
    assert exchanges and not any("replica" in one.axes for one in exchanges)


def test_devices_that_make_no_groups_are_refused():
    with pytest.raises(UserError, match=r"mesh.replica=3 does not divide the 8 devices found; 1, 2, 4 or 8 would"):
        Groups(MeshConfig(replica=3), jax.devices())
    with pytest.raises(UserError, match=r"multiple of 4 devices, 2 found.*in each of the 4 groups of mesh.replica"):
        Groups(MeshConfig(fsdp=4, replica=4), jax.devices())
    with pytest.raises(UserError, match=r"mesh.replica=2 splits the runs of a sweep; one run has none: leave it 1"):
        make_mesh(MeshConfig(replica=2), jax.devices())
    with pytest.raises(ValueError, match=r"mesh.replica must be at least 1, got 0"):
        MeshConfig(replica=0)
