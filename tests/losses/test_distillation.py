"""Divergences of two known distributions, and what the Jensen-Shannon divergence must obey."""

import numpy as np
import pytest

from rlhf_jax.losses.distillation import forward_kl, jensen_shannon, reverse_kl
from tests.properties import Case, Properties, normal

LOGITS = normal("logits", "teacher_logits", shape=(5, 7))


class TestProperties(Properties):
    cases = (
        Case(forward_kl, LOGITS),
        Case(reverse_kl, LOGITS),
        Case(jensen_shannon, LOGITS, {"beta": 0.3}),
    )


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def two(seed=0):
    """Logits of student and teacher, and their probabilities in float64."""
    logits = np.random.default_rng(seed).normal(size=(2, 4, 6)).astype(np.float32) * 2
    wide = np.exp(logits.astype(np.float64))
    return *logits, *(wide / wide.sum(-1, keepdims=True))


def test_both_kls_are_the_sums_of_their_definitions():
    logits, teacher_logits, q, p = two()
    np.testing.assert_allclose(forward_kl(logits, teacher_logits)[0], (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(reverse_kl(logits, teacher_logits)[0], (q * np.log(q / p)).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_is_the_entropy_that_mixing_adds(beta):
    logits, teacher_logits, q, p = two()
    added = entropy(beta * p + (1 - beta) * q) - beta * entropy(p) - (1 - beta) * entropy(q)
    np.testing.assert_allclose(jensen_shannon(logits, teacher_logits, beta=beta)[0], added, rtol=1e-4)
    swapped = jensen_shannon(teacher_logits, logits, beta=1 - beta)[0]
    np.testing.assert_allclose(jensen_shannon(logits, teacher_logits, beta=beta)[0], swapped, rtol=1e-5)


def test_at_its_ends_jensen_shannon_is_either_kl(float64):
    logits, teacher_logits, _, _ = (x.astype(np.float64) for x in two())
    near = 1e-6
    np.testing.assert_allclose(
        jensen_shannon(logits, teacher_logits, beta=near)[0] / near, forward_kl(logits, teacher_logits)[0], rtol=1e-3
    )
    np.testing.assert_allclose(
        jensen_shannon(logits, teacher_logits, beta=1 - near)[0] / near,
        reverse_kl(logits, teacher_logits)[0],
        rtol=1e-3,
    )


def test_a_student_that_is_the_teacher_costs_nothing():
    logits = two()[0]
    for loss in (forward_kl, reverse_kl, jensen_shannon):
        np.testing.assert_allclose(loss(logits, logits)[0], 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_mixture_of_one_alone_is_refused(beta):
    with pytest.raises(ValueError, match="beta must lie in"):
        jensen_shannon(*two()[:2], beta=beta)
