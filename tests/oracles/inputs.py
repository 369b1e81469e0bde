"""What the peers and our functions are given: NumPy alone and one seed a set, so that any environment makes it.

The numbers are drawn away from kinks (no ties, no ratio on a clip bound), since a gradient there is a matter of taste.
The JSON files carry the arrays as well, so the tests do not lean on NumPy's streams staying as they are.
"""

from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """What a value's elements are weighted by before its gradient is taken: cos 0, cos 1, cos 2, …

    A plain sum would not do: that of whitened numbers is 0 whatever they are, and so is its gradient.
    """
    return np.cos(np.arange(np.prod(shape, dtype=int))).reshape(shape)


def _lengths_mask(lengths: list[int], width: int, starts: list[int] | None = None) -> np.ndarray:
    """Rows of contiguous Trues, each of its length and from its start (0 unless given)."""
    columns, starts = np.arange(width), np.zeros(len(lengths), int) if starts is None else np.array(starts)
    ends = starts + np.array(lengths)
    return (columns >= starts[:, None]) & (columns < ends[:, None])


def _logps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Log-probabilities of tokens, from e^-3 to almost 1."""
    return -rng.uniform(0.05, 3.0, shape)


def _near(rng: np.random.Generator, logps: np.ndarray, spread: float) -> np.ndarray:
    """Another policy's log-probabilities of the same tokens, kept below 0."""
    return np.minimum(logps + rng.normal(scale=spread, size=logps.shape), -0.01)


def pairs() -> Arrays:
    """Chosen and rejected completions of five prompts, per token, with the reference's; lengths differ, starts too."""
    rng = np.random.default_rng(1)
    chosen, rejected = _logps(rng, 5, 6), _logps(rng, 5, 6)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": _near(rng, chosen, 0.6),
        "ref_rejected_logps": _near(rng, rejected, 0.6),
        "chosen_mask": _lengths_mask([6, 4, 3, 5, 2], 6, [0, 1, 2, 0, 0]),
        "rejected_mask": _lengths_mask([3, 6, 2, 4, 5], 6, [0, 0, 3, 1, 0]),
    }


def unpaired() -> Arrays:
    """Six completions, each desirable or not, and six mismatched ones (another prompt's) for the KL."""
    rng = np.random.default_rng(2)
    logps, kl_logps = _logps(rng, 6, 5), _logps(rng, 6, 5)
    return {
        "logps": logps,
        "ref_logps": _near(rng, logps, 0.8),
        "mask": _lengths_mask([5, 3, 4, 2, 5, 1], 5, [0, 1, 1, 3, 0, 2]),
        "desirable": np.array([True, True, False, True, False, False]),
        "kl_logps": kl_logps,
        "ref_kl_logps": _near(rng, kl_logps - 0.25, 0.3),
        "kl_mask": _lengths_mask([4, 5, 2, 3, 5, 4], 5),
    }


def unpaired_below() -> Arrays:
    """The same with a policy below its reference on the mismatched completions: the KL's estimate is negative."""
    arrays = unpaired()
    return {**arrays, "kl_logps": arrays["ref_kl_logps"], "ref_kl_logps": arrays["kl_logps"]}


def rollout() -> Arrays:
    """Four completions from token 0 to different ends, off-policy by enough for some ratios to clip."""
    rng = np.random.default_rng(3)
    logps = _logps(rng, 4, 7)
    values = rng.normal(size=(4, 7))
    returns = rng.normal(size=(4, 7))
    return {
        "logps": logps,
        "old_logps": _near(rng, logps, 0.35),
        "ref_logps": _near(rng, logps, 0.5),
        "values": values,
        "old_values": values + rng.normal(scale=0.3, size=values.shape),
        "returns": returns,
        "rewards": rng.normal(size=(4, 7)),
        "advantages": rng.normal(size=(4, 7)),
        "scores": rng.normal(size=4),
        "seq_advantages": np.array([0.9, -1.3, 0.4, -0.6]),
        "mask": _lengths_mask([7, 4, 2, 5], 7),
    }


def sampler() -> Arrays:
    """The rollout's masks with log-probabilities of the trainer and of the sampler, a few of which are far apart."""
    rng = np.random.default_rng(4)
    logps = _logps(rng, 4, 7)
    return {"logps": logps, "old_logps": _near(rng, logps, 0.5), "mask": _lengths_mask([7, 4, 2, 5], 7)}


def groups() -> Arrays:
    """Scores of four completions of each of three prompts."""
    return {"scores": np.random.default_rng(5).normal(size=(3, 4))}


def scored_pairs() -> Arrays:
    """A reward model's scores of six pairs, with margins."""
    rng = np.random.default_rng(6)
    chosen, rejected = rng.normal(size=(2, 6)) * 2
    return {"chosen_scores": chosen, "rejected_scores": rejected, "margin": rng.uniform(0, 1, 6)}


def ranked() -> Arrays:
    """Scores of five completions of each of three prompts, first the best; `best` is the index of some other one."""
    return {"scores": np.random.default_rng(7).normal(size=(3, 5)), "best": np.array([2, 0, 4])}


def logits() -> Arrays:
    """Logits of policy and reference over nine tokens, the tokens that stand beside them, and a mask of some."""
    rng = np.random.default_rng(8)
    made, ref = rng.normal(size=(2, 3, 4, 9)) * 1.5
    return {
        "logits": made,
        "ref_logits": ref,
        "tokens": rng.integers(0, 9, (3, 4)),
        "mask": _lengths_mask([2, 3, 1], 4, [2, 1, 1]),
    }


def steps() -> Arrays:
    """A process reward model's two logits at eight tokens of three solutions; `labels` stand at the ends of steps."""
    rng = np.random.default_rng(9)
    mask = rng.random((3, 8)) < 0.4
    mask[:, 5] = True
    return {"logits": rng.normal(size=(3, 8, 2)), "labels": rng.random((3, 8)) < 0.5, "mask": mask}


def ratings() -> Arrays:
    """Scores against labels, right or wrong, probabilities, ratings on a scale, and stars from 0 to 3."""
    rng = np.random.default_rng(10)
    return {
        "scores": rng.normal(size=8),
        "labels": rng.random(8) < 0.5,
        "probabilities": rng.uniform(0.1, 0.9, 8),
        "ratings": rng.uniform(1, 5, 8),
        "stars": np.array([0, 3, 1, 2, 3, 0, 1, 2]),
        "thresholds": np.array([-1.1, 0.2, 1.7]),
    }


def offline() -> Arrays:
    """ILQL's arrays: two Q heads and their targets over seven tokens, V of each state and of the one after the last.

    Row 1 ends after three actions and row 2 after four: `mask` is True on actions, and the rewards come at the ends.
    """
    rng = np.random.default_rng(11)
    mask = _lengths_mask([5, 3, 4], 5)
    rewards = np.zeros((3, 5))
    rewards[np.arange(3), [4, 2, 3]] = rng.normal(size=3)
    return {
        "logits": rng.normal(size=(3, 5, 7)),
        "qs": rng.normal(size=(2, 3, 5, 7)),
        "target_qs": rng.normal(size=(2, 3, 5, 7)),
        "values": rng.normal(size=(3, 6)),
        "rewards": rewards,
        "actions": rng.integers(0, 7, (3, 5)),
        "mask": mask,
    }


def stream() -> Arrays:
    """Three batches of scores in turn, for what runs over batches."""
    return {"scores": np.random.default_rng(12).normal(loc=0.7, scale=1.8, size=(3, 6))}


SETS: dict[str, Callable[[], Arrays]] = {
    make.__name__: make
    for make in (
        pairs,
        unpaired,
        unpaired_below,
        rollout,
        sampler,
        groups,
        scored_pairs,
        ranked,
        logits,
        steps,
        ratings,
        offline,
        stream,
    )
}
