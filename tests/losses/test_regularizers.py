"""Terms that are added to another loss, and the Fisher information against the analytic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax.losses import regularizers
from rlhf_jax.losses.regularizers import elastic_weight_consolidation, entropy_bonus, pretraining_mix
from rlhf_jax.types import Mean
from tests.properties import Case, Properties, normal

EXAMPLES = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)


def fisher_diagonal(params):
    """Of five normal variables of variance 1 each, at fixed examples."""
    return regularizers.fisher_diagonal(lambda p, x: -jnp.sum(jnp.square(p - x)) / 2, params, EXAMPLES)


class TestProperties(Properties):
    cases = (
        Case(entropy_bonus, normal("entropy")),
        Case(pretraining_mix, normal("logps"), {"ptx_coef": 27.8}),
        Case(elastic_weight_consolidation, normal("params", "anchor", "fisher"), rowwise=False, aligned=False),
        Case(fisher_diagonal, normal("params"), rowwise=False, aligned=False),
    )


def test_less_entropy_costs_more():
    loss, diagnostics = entropy_bonus(np.float32([0.5, 2.0]))
    assert loss.tolist() == [-0.5, -2.0] and diagnostics == {}


def test_pretraining_is_cross_entropy_at_its_price():
    loss, diagnostics = pretraining_mix(np.float32([-0.5, -2.0]), ptx_coef=10.0)
    assert loss.tolist() == [5, 20] and diagnostics["cross_entropy"].tolist() == [0.5, 2]
    with pytest.raises(ValueError, match=r"ptx_coef must lie in .*, got -1"):
        pretraining_mix(np.zeros(2, np.float32), ptx_coef=-1.0)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"layer": {"w": rng.normal(size=(2, 3)).astype(np.float32)}, "b": rng.normal(size=3).astype(np.float32)}


def test_consolidation_is_nothing_at_the_anchor_and_pulls_towards_it():
    params, fisher = tree(0), jax.tree.map(np.abs, tree(1))
    loss, diagnostics = elastic_weight_consolidation(params, params, fisher)
    assert loss == 0 and diagnostics["squared_distance"] == 0
    anchor = tree(2)
    loss = elastic_weight_consolidation(params, anchor, fisher)[0]
    parts = jax.tree.map(lambda p, a, f: (f * (p - a) ** 2).sum() / 2, params, anchor, fisher)
    np.testing.assert_allclose(loss, sum(jax.tree.leaves(parts)), rtol=1e-5)
    gradient = jax.grad(lambda p: elastic_weight_consolidation(p, anchor, fisher)[0])(params)
    expected = jax.tree.map(lambda p, a, f: f * (p - a), params, anchor, fisher)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5), gradient, expected)


def test_consolidation_with_a_fisher_of_one_is_half_the_squared_distance():
    ones = jax.tree.map(np.ones_like, tree(0))
    loss, diagnostics = elastic_weight_consolidation(tree(0), tree(1), ones)
    np.testing.assert_allclose(2 * loss, diagnostics["squared_distance"], rtol=1e-6)


def test_trees_that_do_not_match_are_refused_by_name():
    params = tree(0)
    for name, wrong in (("anchor", {"b": params["b"]}), ("fisher", {**params, "b": np.ones(4, np.float32)})):
        arguments = {"params": params, "anchor": params, "fisher": params, name: wrong}
        with pytest.raises(TypeCheckError, match=name):
            elastic_weight_consolidation(**arguments)


def test_a_term_times_the_count_does_not_mind_microbatches():
    """As its docstring has it added to the total of a `Mean`."""
    term, parts = np.float32(0.7), (Mean(np.float32(6), np.float32(3)), Mean(np.float32(4), np.float32(1)))
    split = [Mean(part.total + term * part.count, part.count) for part in parts]
    np.testing.assert_allclose((split[0] + split[1]).value, 2.5 + 0.7, rtol=1e-6)


def test_fisher_of_a_bernoulli_logit_is_p_times_one_minus_p():
    """Enumerated: ones and zeros in the proportion of their probabilities."""
    draws = np.repeat([1.0, 0.0], [3, 1]).astype(np.float32)
    fisher = regularizers.fisher_diagonal(
        lambda logit, y: y * jax.nn.log_sigmoid(logit) + (1 - y) * jax.nn.log_sigmoid(-logit), jnp.log(3.0), draws
    )
    np.testing.assert_allclose(fisher, 0.75 * 0.25, rtol=1e-5)


def test_fisher_of_softmax_logits_is_p_times_one_minus_p():
    counts = np.array([1, 2, 5])
    examples = {"class": np.repeat(np.arange(3), counts), "copy": np.arange(8)}
    params = {"logits": np.log(counts).astype(np.float32), "unused": np.ones(2, np.float32)}
    fisher = regularizers.fisher_diagonal(
        lambda params, example: jax.nn.log_softmax(params["logits"])[example["class"]], params, examples
    )
    p = counts / 8
    np.testing.assert_allclose(fisher["logits"], p * (1 - p), rtol=1e-5)
    assert not fisher["unused"].any()


def test_fisher_is_the_mean_curvature_of_the_divergence():
    """½ Σ F δ² approximates KL(p_θ‖p_{θ + δ}) for a small step of one parameter."""
    logit, step = np.float32(0.3), np.float32(1e-2)
    p, q = jax.nn.sigmoid(logit), jax.nn.sigmoid(logit + step)
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    fisher = p * (1 - p)
    np.testing.assert_allclose(elastic_weight_consolidation(logit + step, logit, fisher)[0], divergence, rtol=3e-2)


def test_no_examples_no_fisher():
    with pytest.raises(ValueError, match=r"number of examples must lie in .*, got 0"):
        regularizers.fisher_diagonal(lambda p, x: p * x, jnp.ones(()), np.zeros(0, np.float32))
