"""Completions for any number of prompts on the host: batched, padded, sharded."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from rlhf_jax import hosts, lockstep, sharding
from rlhf_jax.data.prompts import pad_left
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import ModelSpec, Policy
from rlhf_jax.sampling.decode import ended, generate
from rlhf_jax.sampling.stopping import Stops, stops
from rlhf_jax.sampling.transforms import Sampling
from rlhf_jax.sampling.turns import Turns
from rlhf_jax.types import Key, Rollout


class Sample(NamedTuple):
    """One completion: its tokens, with EOS or the end of a stop string where it ended, and whether it did."""

    prompt: list[int]
    tokens: list[int]
    ended: bool


def sampling_program(
    spec: ModelSpec,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    turns: Turns | None = None,
    stops: Stops | None = None,
) -> Callable[[Policy, Array, Array, Key], Rollout]:
    """`generate`, compiled, of (policy, prompts [b, p], prompt_mask [b, p], key)."""

    def program(policy: Policy, tokens: Array, mask: Array, key: Key) -> Rollout:
        return generate(
            *(spec, policy, tokens, mask, key),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            turns=turns,
            stops=stops,
        )

    return lockstep.jit(program)


class Sampler:
    """A policy as a function of prompts; compiled once, for one shape."""

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        prompt_length: int,
        max_new_tokens: int,
        sampling: Sampling,
        batch_size: int = 128,
        turns: Turns | None = None,
    ) -> None:
        """Prompts may have at most `prompt_length` tokens; `batch_size` must divide by the mesh's batch axes.

        Raises UserError for a `sampling.stop` that the tokenizer cannot write.
        """
        self.sampling = sampling
        self._mesh, self._tokenizer = mesh, tokenizer
        self._prompt_length, self._batch_size = prompt_length, batch_size

        self._generate = sampling_program(
            spec,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            turns=turns,
            stops=stops(sampling.stop, tokenizer),
        )

    def rollouts(self, policy: Policy, prompts: Sequence[Sequence[int]], key: Key) -> Iterator[tuple[Rollout, int]]:
        """Rollouts of whole batches on the device, each with how many of its rows are real; the others repeat one."""
        for index, start in enumerate(range(0, len(prompts), self._batch_size)):
            part = list(prompts[start : start + self._batch_size])
            filled = part + [part[0]] * (self._batch_size - len(part))
            batch = pad_left(filled, length=self._prompt_length, pad_id=self._tokenizer.pad_id)
            with sharding.scope(self._mesh):
                tokens, mask = sharding.shard_batch(self._mesh, batch)
                rollout = self._generate(policy, tokens, mask, jax.random.fold_in(key, index))
            yield rollout, len(part)

    def batches(self, policy: Policy, prompts: Sequence[Sequence[int]], key: Key) -> Iterator[list[Sample]]:
        """One completion a prompt, in order, a batch at a time."""
        for index, (rollout, count) in enumerate(self.rollouts(policy, prompts, key)):
            host = hosts.fetch(rollout)
            has_ended = ended(host, self._tokenizer.eos_id)
            start = index * self._batch_size
            completions = [host.tokens[row][host.completion_mask[row]].tolist() for row in range(count)]
            yield [
                Sample(list(prompts[start + row]), completion, bool(has_ended[row]))
                for row, completion in enumerate(completions)
            ]

    def __call__(self, policy: Policy, prompts: Sequence[Sequence[int]], key: Key) -> list[Sample]:
        """One completion a prompt, in order."""
        return [sample for batch in self.batches(policy, prompts, key) for sample in batch]
