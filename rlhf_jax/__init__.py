"""RLHF in JAX: pure-functional networks, composable losses, sharded stages driven by experiment configs."""

__version__ = "0.1.0"
