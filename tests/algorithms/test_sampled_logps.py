"""`old_logps`: what sampling says of its own tokens in place of another forward pass, and values of a shared trunk."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import online_preference
from rlhf_jax.algorithms.iterations import behaviour
from rlhf_jax.models.spec import Lora
from rlhf_jax.plan import flops
from rlhf_jax.sampling import Sampling, Turns
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.test_ppo_shared_trunk import CONFIG, SPEC, start

pytestmark = pytest.mark.usefixtures("compile_quickly")


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def scoring(folder, config, *, spec=SPEC, mesh=None):
    """A program that samples and scores, and what it is called on."""
    algorithm, state, frozen, prompts = start(folder, config, spec=spec, mesh=mesh)

    def program(state, frozen, prompts):
        rollout = algorithm.sample(behaviour(state.policy), frozen, prompts)
        return algorithm.score(state.policy.params, frozen, rollout)

    return program, (state, frozen, prompts)


def scored(folder, config, *, mesh=None, **options):
    program, args = scoring(folder, config, mesh=mesh, **options)
    with sharding.scope(sharding.single_device_mesh() if mesh is None else mesh):
        return jax.device_get(jax.jit(program)(*args))


CASES = {
    "all at once": {},
    "turns, colder": {"turns": Turns(8, 1), "sampling": Sampling(temperature=0.7)},
    "top-k, longest ends": {"sampling": Sampling(top_k=20, ends=False)},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_sampled_is_what_is_read_again(case, tmp_path):
    plain, metrics = scored(tmp_path / "again", change(**CASES[case]))
    ours, our_metrics = scored(tmp_path / "sampled", change(old_logps="sampled", exact_kl_rows=3, **CASES[case]))
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    for name in ("logps", "values", "ref_logps", "scores"):
        np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=1e-4)
        assert np.abs(getattr(ours, name)).max() > 0.1
    assert not ours.values[~ours.completion_mask].any()
    for name in ("score", "kl", "seq_kl", "length", "no_eos"):
        assert our_metrics[name] == pytest.approx(metrics[name], abs=1e-4)
    assert metrics.keys() == our_metrics.keys() and our_metrics["sampling_deviation"] < 1e-4
    _, some_metrics = scored(tmp_path / "some", change(exact_kl_rows=3, **CASES[case]))
    assert our_metrics["seq_kl_exact"] == pytest.approx(some_metrics["seq_kl_exact"], abs=1e-4)
    logits = models.logits(SPEC, _trunk(tmp_path), plain.tokens[:3], plain.mask[:3])[:, :-1]
    logps = jax.nn.log_softmax(logits / CASES[case].get("sampling", Sampling()).temperature)
    kept = plain.completion_mask[:3, 1:]
    entropy = -(np.exp(logps) * logps).sum(-1)[kept].mean()
    assert our_metrics["entropy"] == pytest.approx(float(entropy), abs=1e-4)


def _trunk(folder):
    _, state, frozen, _ = start(folder / "trunk", CONFIG)
    whole = frozen.policy(state.policy.params)
    return {name: part for name, part in whole.items() if name != "head"}


def test_a_mesh_and_adapters_say_the_same(tmp_path):
    spec = dataclasses.replace(SPEC, lora=Lora(rank=2, targets=("query",)))
    config = change(old_logps="sampled", turns=Turns(8, 0))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, metrics = scored(tmp_path / "one", config, spec=spec)
    many, other_metrics = scored(tmp_path / "many", config, spec=spec, mesh=mesh)
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.logps, many.logps, atol=1e-4)
    np.testing.assert_allclose(one.values, many.values, atol=1e-4)
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, abs=1e-4), name


def test_a_forward_pass_of_the_policy_is_saved(tmp_path):
    """Three networks read 16 completions: with `sampled` the policy reads 2 of them, and the reference these twice."""

    two = dataclasses.replace(SPEC, n_layers=2)  # of a single layer, which is unrolled, the reward reads its last token

    def work(config):
        algorithm, state, frozen, prompts = start(tmp_path / config.old_logps, config, spec=two)
        rollout = jax.eval_shape(algorithm.sample, behaviour(state.policy), frozen, prompts)
        traced = jax.jit(algorithm.score).trace(state.policy.params, frozen, rollout)
        return flops.count(traced.jaxpr).total()

    again, sampled = work(change(exact_kl_rows=2)), work(change(exact_kl_rows=2, old_logps="sampled"))
    assert sampled / again == pytest.approx((2 + 2 * 2 / 16) / 3, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_far_the_two_may_be_apart(dtype, tmp_path):
    """The bounds that the field's docstring states."""
    spec = dataclasses.replace(SPEC, dtype=dtype)
    deviations = []
    for kind in ("model", "int8"):
        config = change(sampling=Sampling(cache=kind))
        deviations.append(float(scored(tmp_path / kind, config, spec=spec)[1]["sampling_deviation"]))
    print(dtype, deviations)
    assert deviations[0] < {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    assert 1e-4 < deviations[1] < 0.5


def test_sampled_where_another_wrote_or_nothing_is_saved_is_refused():
    with pytest.raises(ValueError, match="old_logps='sampled' are the writer's: with second='reference'"):
        online_preference.Config(second="reference", old_logps="sampled")
    with pytest.raises(ValueError, match="exact_kl_rows=9 must be at most half of batch_size=16"):
        change(old_logps="sampled", exact_kl_rows=9)
    assert "biased" in change(sampling=Sampling(cache="int8")).notes()[0]
    assert not change(sampling=Sampling(cache="int8"), old_logps="sampled").notes()
