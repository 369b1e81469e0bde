"""What is measured: the models' sizes, and of each the rows and lengths of every kind of work."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.sizes import LLAMA_8B, SMOLLM2_135M

PAD, BOS, EOS = 0, 1, 2
"""Tokens of every size; all others are drawn for prompts and completions."""


@dataclass(frozen=True)
class Work:
    """One row of the table: what a process does again and again, a turn at a time."""

    size: str
    """A name of `SIZES`, or `COMMAND`."""
    what: str
    """A name of `KINDS`, such as "sft" or "ppo/natural"."""
    rows: int
    """Of a batch; of rm and dpo pairs."""
    prompt: int
    """Tokens of a prompt; of sft all of them are learnt from."""
    completion: int
    """Tokens of a completion, or the most of them."""
    turns: int
    """Steps, iterations or batches of completions that are timed, after those that compile and warm up."""
    epochs: int = 1
    """Passes over an iteration's completions."""
    minibatches: int = 1
    """Optimiser steps a pass."""
    group: int = 1
    """Completions of one prompt."""

    @property
    def kind(self) -> str:
        """A name of `KINDS`."""
        return self.what.partition("/")[0]

    @property
    def variant(self) -> str:
        """What follows the kind, or nothing."""
        return self.what.partition("/")[2]

    @property
    def length(self) -> int:
        """Tokens of a whole row."""
        return self.prompt + self.completion

    @property
    def weights(self) -> str:
        """The folder of the model: whether its completions run to their limit, or end by themselves."""
        return f"{self.size}-{'natural' if self.variant == 'natural' else 'full'}"

    @property
    def of_peers(self) -> "Work":
        """What other libraries do for comparison: they have no trunk that networks share."""
        return replace(self, what=self.kind) if self.variant in ("shared", "hydra") else self

    def pairs(self, asked: int) -> int:
        """How often each side is measured: what takes half an hour is measured once."""
        return 1 if self.kind == "sweep" else asked

    def job(self, models: Path, *, threads: int) -> dict[str, Any]:
        """What a measuring process is told."""
        told = {**asdict(self), "kind": self.kind, "variant": self.variant, "threads": threads}
        if self.size not in SIZES:
            return told
        size = SIZES[self.size]
        precision = "bfloat16" if size.accelerator else "float32"
        model = {"model": str((models / self.weights).resolve()), "vocab": size.spec.vocab_size, "precision": precision}
        return {**told, **model, "ends": [PAD, BOS, EOS], "seed": 0}


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much of it is computed at once."""

    spec: ModelSpec
    rows: dict[str, tuple[int, int, int, int]]
    """By kind of work: rows, prompt tokens, completion tokens, turns; of decode rows are those of its larger batch."""
    accelerator: bool = False
    """Whether it is measured where there is an accelerator alone, in bfloat16."""


TINY = ModelSpec(
    vocab_size=4096, d_model=192, n_layers=4, n_heads=6, n_kv_heads=6, head_dim=32, d_ff=512, max_len=2048,
    scale_embedding=False, tied=False,
)  # fmt: skip
SMALL = replace(TINY, vocab_size=8192, d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=1408)
LLAMA_1B = replace(LLAMA_8B, d_model=2048, n_layers=16, head_dim=64, d_ff=8192, tied=True)

SIZES: dict[str, Size] = {
    "tiny": Size(
        TINY,
        {
            "sft": (32, 128, 0, 10), "rm": (32, 16, 48, 10), "dpo": (32, 16, 48, 10),
            "decode": (32, 16, 128, 4), "ppo": (64, 16, 48, 2), "grpo": (64, 16, 48, 4),
        },
    ),
    "small": Size(
        SMALL,
        {
            "sft": (16, 128, 0, 5), "rm": (16, 32, 64, 4), "dpo": (16, 32, 64, 4),
            "decode": (32, 32, 128, 2), "ppo": (32, 32, 64, 1), "grpo": (32, 32, 64, 2),
        },
    ),
    "smollm2": Size(
        SMOLLM2_135M,
        {
            "sft": (8, 128, 0, 2), "rm": (4, 32, 64, 2), "dpo": (4, 32, 64, 2),
            "decode": (32, 32, 64, 1), "ppo": (16, 32, 32, 1), "grpo": (16, 32, 32, 1),
        },
    ),
    "1b": Size(
        LLAMA_1B,
        {
            "sft": (8, 1024, 0, 10), "rm": (8, 128, 384, 10), "dpo": (8, 128, 384, 10),
            "decode": (64, 128, 256, 4), "ppo": (64, 128, 128, 2), "grpo": (64, 128, 128, 2),
        },
        accelerator=True,
    ),
    "8b": Size(
        LLAMA_8B,
        {
            "sft": (4, 1024, 0, 5), "rm": (2, 128, 384, 5), "dpo": (2, 128, 384, 5),
            "decode": (64, 128, 256, 2), "ppo": (16, 128, 128, 1), "grpo": (16, 128, 128, 1),
        },
        accelerator=True,
    ),
}  # fmt: skip
"""The models by name: 3.3M parameters, 34M, SmolLM2-135M's shape, and those of Llama 3 with 1 and 8 billion."""

COSTS = (*((rows, 48) for rows in (8, 16, 32, 64, 128, 256)), *((16, length) for length in (64, 128, 256, 512, 1024)))
"""Rows and completion tokens of the curves of cost."""
KINDS = {
    "sft": ("sft",),
    "rm": ("rm",),
    "dpo": ("dpo",),
    "decode": ("decode/1", "decode/batch"),
    "ppo": ("ppo", "ppo/natural", "ppo/shared", "ppo/hydra"),
    "grpo": ("grpo",),
    "cost": tuple(f"cost/{rows}x{completion}" for rows, completion in COSTS),
    "cold": ("cold/compiling", "cold/cached"),
    "sweep": ("sweep/apart", "sweep/together"),
}
"""The kinds of work and their variants: decoding a single row or a batch; PPO with completions that run to their limit,
that end by themselves at a quarter of it in the mean, with a value head on the policy, with one frozen base and an
adapter a network; of the smallest size PPO by rows and by the length of completions; a cold start without and with what
an earlier one has compiled; runs that differ in their seeds, one after another or in a sweep."""

COMMAND = "quickstart"
"""The size that cold starts and sweeps are of: configs/quickstart.py."""
COMMANDS = ("cold", "sweep")
"""The kinds that measure a command."""


def choose(sizes: str, whats: str, *, accelerator: bool) -> list[Work]:
    """The rows of the table, of comma-separated names, commands last; UserError for a name that there is not."""
    chosen = []
    for size in names("--sizes", sizes, tuple(SIZES)):
        if SIZES[size].accelerator and not accelerator:
            raise UserError(f"--sizes: {size} is measured on an accelerator, and this machine has none")
        known = (*KINDS, *(what for variants in KINDS.values() for what in variants if "/" in what))
        for name in names("--what", whats, known):
            chosen += [_work(size, what) for what in KINDS.get(name, (name,))]
    return sorted(dict.fromkeys(chosen), key=lambda work: work.size == COMMAND)


def names(flag: str, given: str, known: tuple[str, ...]) -> list[str]:
    """The parts of a comma-separated flag; UserError for one that is not known."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        raise UserError(f"{flag}: {', '.join(unknown) or 'nothing'} is none of {', '.join(known)}")
    return parts


def _work(size: str, what: str) -> Work:
    kind, _, variant = what.partition("/")
    if kind in COMMANDS:
        return Work(COMMAND, what, 0, 0, 0, 1)
    if kind == "cost":
        rows, completion = map(int, variant.split("x"))
        return Work("tiny", what, rows, 16, completion, 2, epochs=4, minibatches=4)
    rows, prompt, completion, turns = SIZES[size].rows[kind]
    more = {"ppo": {"epochs": 4, "minibatches": 4}, "grpo": {"group": 8}}.get(kind, {})
    return Work(size, what, 1 if what == "decode/1" else rows, prompt, completion, turns, **more)
