"""Sampling from a policy."""

from rlhf_jax.sampling.batched import Sample, Sampler
from rlhf_jax.sampling.decode import ended, generate
from rlhf_jax.sampling.transforms import Sampling, transform_logits

__all__ = ["Sample", "Sampler", "Sampling", "ended", "generate", "transform_logits"]
