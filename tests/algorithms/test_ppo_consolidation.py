"""Elastic weight consolidation: the Fisher information of texts, kept, and its price, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import consolidation, policy, trust_region
from rlhf_jax.algorithms.consolidation import Anchor, Consolidation
from rlhf_jax.algorithms.context import Context
from rlhf_jax.data.text import sentence_rows
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import lora
from rlhf_jax.models.spec import Lora
from rlhf_jax.placement import Colocated
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Mean
from tests.algorithms.conftest import SPEC

pytestmark = pytest.mark.usefixtures("compile_quickly")

EWC = Consolidation(coef=3.0, texts=3, row_length=10)
ADAPTED = dataclasses.replace(SPEC, n_layers=1, lora=Lora(rank=2, targets=("query",)))


@pytest.fixture
def context(make_context, pretrained):
    """Of a model of one layer with adapters."""
    plain = make_context()
    layers = jax.tree.map(lambda x: x[:1], pretrained.params["layers"])
    model = Pretrained(ADAPTED, {**pretrained.params, "layers": layers}, pretrained.tokenizer)
    return Context(plain.workdir, 0, plain.mesh, model, plain.data)


def start_of(context):
    """Adapters that change something, or the first of them would have no gradient."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), context.policy_params("base"))


def test_fisher_is_the_mean_square_of_each_texts_own_gradient(context, capsys):
    start = start_of(context)
    anchor = consolidation.anchored(EWC, context, "ppo", start)
    texts = context.reviews.train
    chosen = context.rng("ppo/fisher").permutation(len(texts))[:3]
    squares = []
    for index in chosen:
        tokens = np.asarray([sentence_rows([texts[index].text], context.tokenizer, row_length=10)[0].tokens])

        def logp(own, tokens=tokens):
            logits = models.logits(ADAPTED, lora.merge(context.base, own), tokens)
            return jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).sum()

        squares.append(jax.tree.map(np.square, jax.jit(jax.grad(logp))(start)))
    for found, *each in zip(*map(jax.tree.leaves, (anchor.fisher, *squares)), strict=True):
        np.testing.assert_allclose(found, np.mean(each, 0), rtol=1e-4, atol=1e-6)
        assert np.asarray(found).max() > 0

    # It is read where it was written, not found again; and written anew where a file is damaged.
    changed = jax.tree.map(lambda x: x + 1, start)
    again = consolidation.anchored(EWC, context, "ppo", changed)
    jax.tree.map(np.testing.assert_array_equal, again.fisher, anchor.fisher)
    (context.stage_dir("ppo") / "fisher" / "digests.json").write_text("{}")
    assert "fisher" not in capsys.readouterr().err
    other = consolidation.anchored(EWC, context, "ppo", changed)
    told = " ".join(capsys.readouterr().err.split())
    assert "ppo: " in told and "digests.json is no list of digests" in told and "fisher.damaged and found again" in told
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (other.fisher, anchor.fisher)), strict=True))


@pytest.mark.slow
def test_a_mesh_finds_the_same(make_context):
    """Stages among its axes too, whose batches must divide."""
    found = []
    for name, mesh in (("one", None), ("many", MeshConfig(data=2, pipeline=2, tensor=2))):
        context = make_context(name, mesh=mesh)
        found.append(jax.device_get(consolidation.fisher(EWC, context, "ppo", context.policy_params("base"))))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_penalty_is_that_of_kirkpatrick_whatever_the_parts():
    rng = np.random.default_rng(0)
    params, start, fisher = ({"layers": {"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))}} for _ in range(3))
    fisher = jax.tree.map(np.square, fisher)

    def loss_fn(params, batch, hyper, key):
        return Mean((batch * params["layers"]["a"]).sum(), jnp.float32(batch.size)), {}

    added = consolidation.held(loss_fn, Anchor(start, fisher))
    batch = rng.normal(size=(4, 3))

    def mean(params, parts):
        whole = {**params, "frozen": jnp.zeros(5)}  # what lies under adapters is not held
        found = [added(whole, part, {"ewc_coef": 3.0}, None) for part in np.split(batch, parts)]
        return sum((loss for loss, _ in found[1:]), found[0][0]).value

    one, two = (jax.grad(mean)(params, parts) for parts in (1, 2))
    own = {"a": batch.sum(0) / 12, "b": np.zeros((2, 2))}
    for name, theta in params["layers"].items():
        wanted = own[name] + 3.0 * fisher["layers"][name] * (theta - start["layers"][name])
        np.testing.assert_allclose(one["layers"][name], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(two["layers"][name], wanted, rtol=1e-5, atol=1e-6)
    penalty = added(params, batch, {"ewc_coef": 3.0}, None)[1]["ewc_penalty"].value
    by_hand = sum(
        (fisher["layers"][name] * (theta - start["layers"][name]) ** 2).sum()
        for name, theta in params["layers"].items()
    )
    assert float(penalty) == pytest.approx(3.0 * by_hand / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": Colocated(("reference",))}, r"ewc needs placement=Colocated\(\) without offload"),
        (
            {"trust_region": trust_region.TrustRegion(), "loss": "surrogate", "clip_eps": None},
            "ewc is no part of trust_region's step",
        ),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        policy.Config(ewc=EWC, **fields)
    with pytest.raises(ValueError, match=r"ewc.coef must lie in \(0, inf\), got 0"):
        Consolidation(coef=0.0)
