"""The one description of a decoder-only transformer."""

from dataclasses import dataclass
from typing import Literal

Remat = Literal["none", "full", "dots"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelSpec:
    """Shape and numerics of a decoder-only transformer (RMSNorm, rotary positions, SwiGLU, grouped-query attention)."""

    vocab_size: int = 4096
    """Rows of the token embedding."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 3
    """Number of decoder blocks; their parameters are stacked along a leading axis."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; a divisor of n_heads (grouped-query attention)."""
    head_dim: int = 64
    """Width of a head."""
    d_ff: int = 704
    """Hidden width of the SwiGLU block."""
    max_len: int = 128
    """Longest row, prompt and completion together, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    tied: bool = True
    """Whether the output head is the transposed token embedding."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, a head at a time."""
    window: int | None = None
    """Sliding attention window in tokens, the current one included (Hugging Face's `sliding_window`); none: all."""
    attention_softcap: float | None = None
    """Caps attention scores at ±c by c·tanh(x/c)."""
    logits_softcap: float | None = None
    """Caps logits at ±c by c·tanh(x/c)."""
    dtype: DType = "float32"
    """Compute type of matrix products; norms, softmax, logits and losses stay in float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, whole blocks, or all but the matrix products."""
    unroll: int = 1
    """How many blocks the loop over layers unrolls; n_layers means no loop (fastest on CPU, slowest to compile)."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "max_len",
            "unroll",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"model.spec.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model.spec.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"model.spec.head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.spec.window must be at least 1 or None, got {self.window}")
