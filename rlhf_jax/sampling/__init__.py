"""Sampling from a policy."""

from rlhf_jax.sampling.decode import ended, generate
from rlhf_jax.sampling.transforms import Sampling, transform_logits

__all__ = ["Sampling", "ended", "generate", "transform_logits"]
