"""The zero and the unit of a reward model's scores: on samples or references, before training and after, by value."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms.reward_presets import PRESETS
from rlhf_jax.algorithms.reward_units import _answered
from rlhf_jax.data.encoding import Learnt
from rlhf_jax.data.sources import HuggingFace, Jsonl
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.conftest import SPEC
from tests.algorithms.test_reward_ensembles import holding
from tests.algorithms.test_reward_model import CONFIG

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def make(tmp_path):
    """Configs on a file of pairs."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"It was {i}", "chosen": " good", "rejected": " bad"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**CONFIG, "init": "base", "pairs": Jsonl(path, heldout=0.2), "completion_tokens": 12, "steps": 4}
    return lambda **more: reward_model.Config(**{**fields, **more})


@pytest.fixture
def references(tmp_path):
    """Twenty demonstrations, the last five held out; one of them too long for a row of 24 tokens."""
    path = tmp_path / "references.jsonl"
    texts = [f" a quiet film about {i} old friends" for i in range(19)] + [" good" * 40]
    path.write_text("".join(json.dumps({"prompt": f"No {i}:", "completion": x}) + "\n" for i, x in enumerate(texts)))
    return Jsonl(path, heldout=0.25)


@pytest.fixture
def contexts(make_context, references):
    """Of an experiment whose rows are the references."""
    return lambda *args, **more: dataclasses.replace(make_context(*args, **more), data=references)


def tokens_of(references, tokenizer, order):
    """Independently of the package's readers: BOS, prompt, completion, EOS; what is too long first loses its prompt."""
    found, lines = [], Path(references.path).read_text().splitlines()
    for row in (json.loads(lines[i]) for i in order):
        prompt, completion = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), tokenizer.eos_id]
        room = max(23 - len(completion), 0)
        found.append([tokenizer.bos_id, *prompt[len(prompt) - min(room, len(prompt)) :], *completion][:24])
    return found


def members(context, name, rows, ensemble=None):
    network = RewardNetwork(SPEC, context.mesh, length=24, pad_id=context.tokenizer.pad_id, ensemble=ensemble)
    return network.members(context.network(name), rows).astype(np.float64)


def test_references_alone_get_mean_0_and_the_unit_stays(make, references, contexts):
    """Huang et al. 2024, Ouyang et al. 2022. Of seven references the five held out come first, one of which is cut."""
    plain, context = contexts("plain"), contexts()
    raw = reward_model.train(make(normalize="none"), plain, "rm")
    config = make(normalize="mean", normalize_on=references, samples=7)
    config.check_inputs(references)
    figures = reward_model.train(config, context, "rm")
    every = tokens_of(references, context.tokenizer, [15, 16, 17, 18, 19, 0, 1])
    before, after = (members(one, "rm", every)[0] for one in (plain, context))
    assert abs(before.mean()) > 1e-3
    assert after.mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(after, before - before.mean(), atol=1e-5)
    assert figures["score_mean"] == pytest.approx(before.mean(), abs=1e-5)
    assert figures["score_std"] == pytest.approx(before.std(), abs=1e-5)
    assert figures["accuracy"] == raw["accuracy"] and figures["log_loss"] == raw["log_loss"]


def test_the_experiments_own_rows_and_both_moments(make, references, contexts):
    context = contexts()
    config = make(normalize="mean_std", normalize_on="references", samples=4)
    config.check_inputs(references)
    reward_model.train(config, context, "rm")
    found = members(context, "rm", tokens_of(references, context.tokenizer, [15, 16, 17, 18]))[0]
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_every_member_has_its_own_zero(make, references, contexts):
    context, two = holding(contexts()), Ensemble(members=2)
    reward_model.train(make(normalize="none", ensemble=two), context, "rm")
    every = tokens_of(references, context.tokenizer, range(15, 19))
    raw = members(context, "rm", every, two)
    other = holding(contexts("other"))
    config = make(normalize="mean", normalize_on=references, samples=4, ensemble=two)
    reward_model.train(config, other, "rm")
    np.testing.assert_allclose(members(other, "rm", every, two), raw - raw.mean(1, keepdims=True), atol=1e-5)
    assert abs(raw[0].mean() - raw[1].mean()) > 1e-3


STILL = Optimizer(1e-30)


@pytest.mark.parametrize("ensemble", [None, Ensemble(members=2), Ensemble(members=2, of="heads")])
def test_before_training_the_new_head_has_mean_0_and_deviation_1(ensemble, make, contexts):
    """With steps that move nothing: what is measured afterwards is what the head was given before."""
    context = contexts() if ensemble is None else holding(contexts(), ensemble)
    fields = {"optimizer": STILL, "ensemble": ensemble, "samples": 16}
    drawn = reward_model.train(make(**fields), context, "rm")
    assert abs(drawn["score_mean"]) > 1e-2 or abs(drawn["score_std"] - 1) > 1e-2
    before = reward_model.train(make(**fields, normalize_before=True), context, "rm2")
    assert (before["score_mean"], before["score_std"]) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-3))
    assert before["log_loss"] != drawn["log_loss"]


def test_what_a_stopped_run_had_learnt_is_not_normalised_again(make, contexts, monkeypatch):
    config = make(normalize_before=True, samples=16, steps=8, checkpoint_every=2, evaluate_every=8)
    whole, broken = contexts("whole"), contexts("broken")
    figures = reward_model.train(config, whole, "rm")
    record = reward_model.Loop.record

    def stop_after_three(self, state, metrics, *, tokens):
        if self._step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model.Loop, "record", stop_after_three)
        with pytest.raises(Stopped):
            reward_model.train(config, broken, "rm")
    assert reward_model.train(config, broken, "rm") == figures
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(c.head_params("rm")) for c in (whole, broken)))


def test_a_mesh_normalises_before_training_too(make, references, contexts):
    config = make(normalize="mean_std", normalize_on=references, normalize_before=True, samples=8)
    one, other = contexts("one"), contexts("other", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    figures, same = (reward_model.train(config, context, "rm") for context in (one, other))
    assert same == pytest.approx(figures, abs=1e-4)


def test_what_stands_behind_the_last_answer_is_not_read():
    assert _answered(Learnt((5, 6, 7, 8, 9), (False, True, False, True, False))) == [5, 6, 7, 8]


def test_bad_choices_are_named(make, references, some_reviews):
    for fields in ({"normalize_on": references}, {"normalize_before": True}):
        with pytest.raises(ValueError, match=r"^normalize_on and normalize_before: normalize='none': leave them"):
            make(normalize="none", **fields)
        with pytest.raises(ValueError, match=r"scores of loss='scalar_rating' are left as they are: leave them"):
            make(loss="scalar_rating", **fields)
    with pytest.raises(UserError, match=r"^normalize_on: 'references' are of the experiment's rows, which are movie"):
        make(normalize_on="references").check_inputs(some_reviews)
    Path(references.path).write_text('{"prompt": "a", "answer": "b"}\n' * 8)
    with pytest.raises(UserError, match=r"^normalize_on: .*references.jsonl, line 1: expected 'prompt' and 'compl"):
        make(normalize_on=references).check_inputs(references)


PAPERS = {
    "ziegler2019": ("best_of_k", 4_992, 32, 64 + 24 + 1, "mean_std", "samples", True),
    "stiennon2020": ("bradley_terry", 92_832, 64, 512 + 169, "mean", "references", False),
    "nplus": ("bradley_terry", 92_832, 64, 512 + 169, "mean", "references", False),
    "instructgpt": ("k_wise", 33_207, 64, 2048, "mean", "references", False),
}
"""Loss, comparisons, batch, length; what is normalised, on what, and whether before training."""
ADAMS = {  # learning rate, schedule and its end, β2, ε and its form, weight decay
    "ziegler2019": (5e-5, "linear", 0.0, 0.999, 1e-5, "tensorflow", 0.0),
    "stiennon2020": (1.5e-5, "cosine", 0.0, 0.999, 1e-5, "torch", 0.0),  # appendix B.1, 1.3B
    "nplus": (3e-6, "cosine", 0.0, 0.999, 1e-5, "torch", 0.01),
    "instructgpt": (9e-6, "cosine", 0.1, 0.95, 1e-8, "torch", 0.0),  # appendix C.2
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_papers_details(name):
    made = reward_model.Config(**PRESETS[name], pairs=HuggingFace("someone/pairs"))
    loss, comparisons, *rest = PAPERS[name]
    assert (made.loss, made.steps) == (loss, comparisons // made.batch_size)
    assert [made.batch_size, made.length, made.normalize, made.normalize_on, made.normalize_before] == rest
    o = made.optimizer
    found = (o.learning_rate, o.schedule, o.final_share, o.b2, o.eps, o.eps_form, o.weight_decay)
    assert found == ADAMS[name] and o.warmup_steps == 0
    assert set(PRESETS) == set(PAPERS)
    assert (made.samples, made.completion_tokens) == (256, 24) or name != "ziegler2019"
