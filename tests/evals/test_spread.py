"""What the spread of an ensemble's members tells of a pair: counted pair by pair."""

import itertools

import numpy as np
import pytest

from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.evals.reward import evaluate_groups, evaluate_spread


def group(i, pairs):
    texts = (f"a {i}", f"b {i}")
    return PreferenceGroup(
        f"prompt {i}", texts, (1, 2), ((3, i + 4), (4, i + 4)), (), pairs, (0.0,) * len(pairs), "file"
    )


def area(spread, labels):
    """P(spread of a 1 > that of a 0), ties a half."""
    ones, zeros = spread[labels], spread[~labels]
    return np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(ones, zeros)])


def test_spread_tells_wrong_and_disputed_pairs_as_counted_by_hand():
    rng = np.random.default_rng(0)
    votes = [((0, 1),) * 3, ((0, 1), (0, 1), (1, 0)), ((1, 0),) * 2, ((1, 0), (0, 1), (1, 0)), ((0, 1),)] * 4
    votes.append(((0, 1), (1, 0)))  # undecided: no pair
    groups = [group(i, pairs) for i, pairs in enumerate(votes)]
    scores = rng.normal(size=(3, len(groups), 2))
    reports = [evaluate_groups(lambda rows, own=own: own.reshape(-1), groups) for own in (*scores, scores.mean(0))]
    found = evaluate_spread(reports[:-1], reports[-1], groups)

    winners = np.array([max(set(pairs), key=pairs.count)[0] for pairs in votes[:-1]])
    lead = scores[:, np.arange(20), winners] - scores[:, np.arange(20), 1 - winners]
    wrong, disputed = lead.mean(0) < 0, np.array([len(set(pairs)) > 1 for pairs in votes[:-1]])
    assert 0 < wrong.sum() < 20 and disputed.sum() == 8
    assert found["spread_wrong_auc"] == pytest.approx(area(lead.std(0), wrong))
    assert found["spread_differed_auc"] == pytest.approx(area(lead.std(0), disputed))
    assert found["spread_wrong_auc_low"] < found["spread_wrong_auc"] < found["spread_wrong_auc_high"]

    agreed = [group(i, ((0, 1),)) for i in range(20)]  # nobody differs, and all are right
    right = [evaluate_groups(lambda rows, k=k: np.tile([k, 0.0], 20), agreed) for k in (1.0, 2.0)]
    assert evaluate_spread(right, right[0], agreed) == {}
