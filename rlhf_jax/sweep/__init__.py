"""Many runs of one experiment, seeds and numbers varied, as one program: `rlhf-jax sweep`."""

from rlhf_jax.sweep.summary import table
from rlhf_jax.sweep.sweep import sweep

__all__ = ["sweep", "table"]
