"""The one description of a decoder-only transformer: a family is a choice of its fields."""

from dataclasses import dataclass
from typing import Literal

from rlhf_jax.numerics import require

Remat = Literal["none", "full", "dots"]
DType = Literal["float32", "bfloat16"]
Attention = Literal["xla", "cudnn", "splash"]
Base = Literal["float32", "bfloat16", "int8", "nf4"]


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by a factor (Chen et al. 2023, "position interpolation")."""

    factor: float
    """How many times longer the context becomes."""


@dataclass(frozen=True)
class Llama3Rope:
    """Long wavelengths stretched, short ones kept, those between blended (Llama 3.1)."""

    factor: float
    """How many times longer the longest wavelengths become."""
    low_freq_factor: float
    """Wavelengths longer than original_max_len over this are stretched."""
    high_freq_factor: float
    """Wavelengths shorter than original_max_len over this are kept."""
    original_max_len: int
    """Context of the pretraining."""


@dataclass(frozen=True)
class YarnRope:
    """Wavelengths stretched by how often they turn within the pretraining's context (YaRN, Peng et al. 2023)."""

    factor: float
    """How many times longer the longest wavelengths become."""
    original_max_len: int
    """Context of the pretraining."""
    attention_factor: float
    """Cosines and sines are multiplied by it; the paper's is 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    """Wavelengths that turn more often than this in that context are kept."""
    beta_slow: float = 1.0
    """Wavelengths that turn less often than this are stretched; those between are blended."""
    truncate: bool = True
    """Whether the blend begins and ends at whole entries of a head."""


@dataclass(frozen=True)
class Experts:
    """A feed-forward block of which a router picks a few experts a token (Shazeer et al. 2017; Jiang et al. 2024)."""

    number: int
    """Experts in a layer, each of hidden width `d_ff`."""
    per_token: int
    """Experts that each token passes through."""
    normalize: bool = True
    """Whether the weights of the picked experts are scaled to sum to 1."""
    balance_coef: float = 0.0
    """Weight of the load-balance loss (`experts.load_balance`) in every stage that trains a policy."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.number:
            raise ValueError(f"experts.per_token={self.per_token} must lie between 1 and number={self.number}")
        require("experts.balance_coef", self.balance_coef, "[0, inf)")


PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
"""The matrices of a dense block that may have adapters."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen kernels (Hu et al. 2021, eq. 3): x W + (alpha / rank) x A B; B starts at 0."""

    rank: int = 8
    """Inner width of an adapter."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = PROJECTIONS
    """The projections that have one."""
    base: Base | None = None
    """How the frozen kernels are stored: wide, or in blocks of 64 with a scale each (QLoRA; `models.quantized`); the
    rest of the base stays as it was loaded. None: all of it."""

    def __post_init__(self) -> None:
        require("lora.rank", self.rank, "[1, inf)")
        require("lora.alpha", self.alpha, "(0, inf)")
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            raise ValueError(f"lora.targets must be some of {', '.join(PROJECTIONS)}, got {self.targets}")


@dataclass(frozen=True)
class ModelSpec:
    """Shape and numerics of a decoder-only transformer; as it stands, of the Llama kind.

    That is RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases. Other families change fields.
    """

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
    """Hidden width of the feed-forward block."""
    max_len: int = 128
    """Longest row, prompt and completion together, in tokens."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How order is told: rotations of queries and keys, or a learned vector a position (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    local_rope_theta: float | None = None
    """The base in layers that see a window only (Gemma 3), never stretched; none: the same."""
    rope_scaling: LinearRope | Llama3Rope | YarnRope | None = None
    """How the wavelengths are stretched to a longer context."""
    rotary_dim: int | None = None
    """Entries of a head that are rotated, the first ones (GPT-NeoX); none: all."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_eps: float = 1e-6
    """Added to the mean square, or the variance, inside the norm."""
    post_norms: bool = False
    """Norms also after attention and feed-forward, before they are added (Gemma 2 and 3)."""
    parallel: bool = False
    """Attention and feed-forward both read the block's input, and are added at once (GPT-NeoX)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """The feed-forward block's nonlinearity."""
    gated: bool = True
    """Whether the nonlinearity's output is multiplied with a second projection (SwiGLU, GeGLU)."""
    experts: Experts | None = None
    """Mixture of experts in place of one feed-forward block; none: dense."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen 2)."""
    out_bias: bool = False
    """A bias of attention's output."""
    mlp_bias: bool = False
    """Biases of the feed-forward block."""
    scale_embedding: bool = True
    """Multiplies token embeddings by √d_model, so that the table's rows may be short (Gemma)."""
    tied: bool = True
    """Whether the output head is the transposed token embedding."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, a head at a time (Qwen 3, Gemma 3)."""
    query_scale: float | None = None
    """Attention scores are multiplied by it; none: head_dim^-0.5."""
    window: int | None = None
    """Sliding attention window in tokens, the current one included (Hugging Face's `sliding_window`); none: all."""
    local_layers: tuple[bool, ...] | None = None
    """Which layers see the window only, one entry a layer; none: all of them, where there is a window."""
    attention_softcap: float | None = None
    """Caps attention scores at ±c by c·tanh(x/c)."""
    logits_softcap: float | None = None
    """Caps logits at ±c by c·tanh(x/c)."""
    lora: Lora | None = None
    """Adapters, which alone are trained, over frozen weights; none: all weights are trained."""
    dtype: DType = "float32"
    """Compute type of matrix products; norms, softmax, logits and losses stay in float32."""
    attention: Attention = "xla"
    """What computes attention over whole rows: those that are learnt from or scored, and prompts. xla: products and a
    softmax over all scores of a row, anywhere. cudnn, splash: kernels that hold a block of scores at a time. cudnn is
    NVIDIA's, for bfloat16 and heads of a multiple of 8 entries up to 256 (128 on GPUs before Hopper), without soft cap.
    splash is JAX's own for TPUs. Decoding reads its cache by plain products with any of them."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, whole blocks, or all but the matrix products."""
    unroll: int = 1
    """How many blocks the loop over layers unrolls; n_layers means no loop (fastest on CPU, slowest to compile)."""

    def __post_init__(self) -> None:
        positive = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_len")
        for name in (*positive, "unroll"):
            if vars(self)[name] < 1:
                raise ValueError(f"model.spec.{name} must be at least 1, got {vars(self)[name]}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model.spec.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if not 1 <= self.rotated <= self.head_dim:
            raise ValueError(f"model.spec.rotary_dim={self.rotary_dim} must lie in 1 … head_dim={self.head_dim}")
        if self.positions == "rotary" and self.rotated % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"model.spec.{name}={self.rotated} must be even: rotary positions turn pairs")
        if self.lora is not None and self.experts is not None and {"gate", "up", "down"} & set(self.lora.targets):
            raise ValueError("model.spec.lora.targets: experts have no adapters; leave out gate, up and down")
        if self.lora is not None and not self.gated and "gate" in self.lora.targets:
            raise ValueError("model.spec.lora.targets: this model's feed-forward block has no gate")
        widths = {"d_model": self.d_model, "n_heads × head_dim": self.n_heads * self.head_dim, "d_ff": self.d_ff}
        for name, width in widths.items():
            if self.lora is not None and self.lora.base == "nf4" and width % 2:
                raise ValueError(f"model.spec.lora.base='nf4' stores two codes a byte: {name} = {width} must be even")
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.spec.window must be at least 1 or None, got {self.window}")
        if self.local_layers is not None and (self.window is None or len(self.local_layers) != self.n_layers):
            raise ValueError(
                f"model.spec.local_layers must have an entry for each of the {self.n_layers} layers, and a window"
            )

        if self.attention == "cudnn":
            self._require_cudnn()

    def _require_cudnn(self) -> None:
        if self.attention_softcap is not None:
            raise ValueError(
                f"model.spec.attention='cudnn' has no attention_softcap, and it is {self.attention_softcap}: "
                "'splash', on TPUs, or 'xla' has"
            )
        if self.dtype != "bfloat16":
            raise ValueError(
                "model.spec.attention='cudnn' takes dtype='bfloat16', which FromPretrained calls compute, "
                f"got {self.dtype!r}; 'xla' takes it"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(
                "model.spec.attention='cudnn' takes a head_dim that is a multiple of 8 up to 256, "
                f"got {self.head_dim}; 'xla' takes it"
            )

    @property
    def rotated(self) -> int:
        """Entries of a head that rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def unrolled(self) -> bool:
        """Whether there is no loop over layers."""
        return self.unroll >= self.n_layers

    @property
    def layer_kinds(self) -> tuple[bool, ...]:
        """For each layer, whether it sees the window only."""
        return (self.window is not None,) * self.n_layers if self.local_layers is None else self.local_layers

    @property
    def kinds(self) -> tuple[bool, ...]:
        """The kinds that there are: False (sees all), True (sees the window only), or both in this order."""
        return tuple(sorted(set(self.layer_kinds)))
