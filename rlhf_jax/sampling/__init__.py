"""Sampling from a policy."""

from rlhf_jax.sampling.batched import Sample, Sampler
from rlhf_jax.sampling.decode import ended, generate
from rlhf_jax.sampling.stopping import Stops, stops
from rlhf_jax.sampling.transforms import Sampling, transform_logits
from rlhf_jax.sampling.turns import Turns

__all__ = [
    "Sample",
    "Sampler",
    "Sampling",
    "Stops",
    "Turns",
    "ended",
    "generate",
    "stops",
    "transform_logits",
]
