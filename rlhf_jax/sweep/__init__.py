"""Many runs of one experiment, seeds and numbers varied: `rlhf-jax sweep`."""

from rlhf_jax.sweep.running import sweep
from rlhf_jax.sweep.summary import table

__all__ = ["sweep", "table"]
