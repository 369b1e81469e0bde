"""The benchmark behind `rlhf-jax bench`: stages' own steps, and other libraries', on the same weights and lengths."""
