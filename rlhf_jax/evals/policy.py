"""What a policy writes for the same prompts before and after training, and what judges say of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rlhf_jax import hosts, lockstep, masking, models, sharding
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.evals.text import distinct_n, equal_tokens
from rlhf_jax.files import write_whole
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.logprobs import token_logps
from rlhf_jax.models import ModelSpec, Policy
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.ensemble import reward as read_reward
from rlhf_jax.rewards.host import Texts
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sampling import Sampler, ended
from rlhf_jax.types import Key, Params, Rollout

Judge = Callable[[Sequence[str]], np.ndarray]
"""Texts to one number each."""

Scorer = Callable[[Sequence[Texts]], np.ndarray]
"""Prompts, completions and rows' other fields to one score each; every process of a run calls it."""

Cut = Callable[[Rollout], Rollout]
"""Sets a rollout's `read_mask`: what of its completions a reward reads."""


@dataclass(frozen=True)
class Row:
    """One completion and its readings: a line of samples.jsonl."""

    prompt: str
    completion: str
    tokens: tuple[int, ...]  # of the completion, with EOS or the end of a stop string
    ended: bool
    readings: dict[str, float]  # "kl" (Σ k1, nats), "score" (the reward's; "uncertainty" its ensemble's), one a judge

    def to_json(self, when: str, step: int) -> dict[str, Any]:
        """As it stands in samples.jsonl."""
        texts = {"prompt": self.prompt, "completion": self.completion, "ended": self.ended}
        return {"when": when, "step": step, **texts, "length": len(self.tokens), **self.readings}


class PolicyEvaluation:
    """Samples a policy on fixed prompts with a fixed key and reads the completions: KL, score, judges.

    The score is a reward network's (its parameters) or a function's of the texts, with `network` beside it if there is
    one, as far as `cut` leaves them. KL is that of the log-probs at `temperature`, whichever one the completions are
    sampled at.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        tokenizer: Tokenizer,
        sampler: Sampler,
        prompts: Sequence[PromptRow],
        key: Key,
        *,
        reward: Params | Scorer,
        ensemble: Ensemble | None = None,
        judges: Mapping[str, Judge],
        temperature: float,
        cut: Cut | None = None,
        network: tuple[NetworkPart, Params] | None = None,
    ) -> None:
        self._mesh, self._tokenizer, self._sampler = mesh, tokenizer, sampler
        self._prompts, self._key, self._judges = prompts, key, judges
        self._cut = (lambda rollout: rollout) if cut is None else lockstep.jit(cut)
        self._network, self._scorer = (reward, None) if isinstance(reward, dict) else ({}, reward)
        self._part, self._network = (None, self._network) if network is None else network

        def readings(policy: Policy, reference: Params | None, network: Params, rollout: Rollout) -> dict[str, Array]:
            read = rollout.prompt_mask | rollout.read
            scores = read_reward(spec, network, ensemble, rollout.tokens, read) if network else {}
            if reference is None:
                return scores
            ref_logps = rollout_logps(spec, reference, rollout, temperature=temperature)
            logps = rollout.logps
            if sampler.sampling.temperature != temperature:
                logps = rollout_logps(spec, policy, rollout, temperature=temperature)
            return {"kl": (logps - ref_logps).sum(-1), **scores}

        self._readings = lockstep.jit(readings)

    def __call__(self, policy: Policy, reference: Params) -> list[Row]:
        """A row a prompt, in the prompts' order."""
        return self.read(policy, reference, self._prompts, self._key)

    def read(self, policy: Policy, reference: Params | None, prompts: Sequence[PromptRow], key: Key) -> list[Row]:
        """The same of other prompts, with another key; without a reference no KL is read."""
        rows: list[Row] = []
        for rollout, count in self._sampler.rollouts(policy, [list(p.tokens) for p in prompts], key):
            with sharding.scope(self._mesh):
                rollout = self._cut(rollout)
                readings = hosts.fetch(self._readings(policy, reference, self._network, rollout))
            host, first = hosts.fetch(rollout), len(rows)
            has_ended = ended(host, self._tokenizer.eos_id)
            for i in range(count):
                tokens = tuple(host.tokens[i][host.completion_mask[i]].tolist())
                prompt = self._tokenizer.decode(host.tokens[i][host.prompt_mask[i]].tolist())
                numbers = {name: float(values[i]) for name, values in readings.items()}
                rows.append(Row(prompt, self._tokenizer.decode(tokens), tokens, bool(has_ended[i]), numbers))
            if self._scorer is not None:  # a batch at a time, as in training: its limit of time is a batch's
                new, asking = rows[first:], prompts[first : first + count]
                read = [self._tokenizer.decode(host.tokens[i][host.read[i]].tolist()) for i in range(count)]
                asked = [Texts(p.text, text, p.metadata) for p, text in zip(asking, read, strict=True)]
                self._add_scores(new, self._scorer(asked))
        texts = [row.prompt + row.completion for row in rows]
        for name, judge in self._judges.items():
            self._add(rows, name, judge(texts))
        return rows

    def _add_scores(self, rows: Sequence[Row], scores: np.ndarray) -> None:
        """A function's scores, and to these what the network beside it adds."""
        if self._part is not None:
            read = np.asarray([row.readings["score"] for row in rows], np.float32)
            self._add(rows, "network_score", read)
            scores = scores + np.asarray(self._part.shaped(read))
        self._add(rows, "score", scores)

    def _add(self, rows: Sequence[Row], name: str, values: np.ndarray) -> None:
        for row, value in zip(rows, values, strict=True):
            row.readings[name] = float(value)


def rollout_logps(spec: ModelSpec, policy: Policy, rollout: Rollout, *, temperature: float) -> Float[Array, "b t"]:
    """Log-probs of a rollout's completion tokens under any policy; 0 elsewhere."""
    states = models.hidden(spec, models.transformer_of(policy), rollout.tokens, rollout.mask)
    logits = models.policy_logits(spec, policy, states[:, :-1])
    logps = token_logps(logits, rollout.tokens[:, 1:], temperature=temperature)
    return masking.keep(jax.numpy.pad(logps, ((0, 0), (1, 0))), rollout.completion_mask)


def compare(before: Sequence[Row], after: Sequence[Row]) -> dict[str, float]:
    """Means before and after; distinct-2 over equal token counts; where it was read, the later policy's sequence KL."""
    figures: dict[str, float] = {}
    tokens = equal_tokens([row.tokens for row in before], [row.tokens for row in after])
    for when, rows in (("before", before), ("after", after)):
        for name in rows[0].readings:
            if name != "kl":
                figures[f"{name}_{when}"] = float(np.mean([row.readings[name] for row in rows]))
        figures[f"distinct2_{when}"] = distinct_n([row.tokens for row in rows], n=2, tokens=tokens)
        figures[f"length_{when}"] = float(np.mean([len(row.tokens) for row in rows]))
    if "kl" in after[0].readings:
        figures["seq_kl"] = float(np.mean([row.readings["kl"] for row in after]))
    return figures


def write_samples(path: Path, before: Sequence[Row], after: Sequence[Row], *, step: int) -> None:
    """Write samples.jsonl whole: the same prompts in the same order, first before and then after."""
    lines = [row.to_json("before", 0) for row in before] + [row.to_json("after", step) for row in after]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
