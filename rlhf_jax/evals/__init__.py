"""Measures of finished networks on held-out data: how well scores rank pairs, how varied samples are."""

from rlhf_jax.evals.preferences import Bin, PairReport, accuracy_interval, evaluate_pairs, pearson
from rlhf_jax.evals.text import distinct_n, equal_tokens

__all__ = ["Bin", "PairReport", "accuracy_interval", "distinct_n", "equal_tokens", "evaluate_pairs", "pearson"]
