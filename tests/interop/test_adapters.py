"""A pretrained model with adapters: the same model at first, in a description that trains the adapters alone."""

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.interop import FromPretrained, load_pretrained
from rlhf_jax.models import lora
from rlhf_jax.models.spec import Lora
from rlhf_jax.sharding import MeshConfig, make_mesh
from tests.interop.folders import write_case
from tests.oracles_hf.weights import read, tokens

pytestmark = pytest.mark.usefixtures("compile_quickly")

CASES = read()
CASE = next(name for name in CASES if name.startswith("llama"))
ADAPTERS = Lora(rank=2, targets=("query", "value"))


@pytest.fixture
def folder(tmp_path):
    return write_case(tmp_path / CASE, CASES[CASE])


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=8)])
def test_fresh_adapters_change_nothing_yet(folder, mesh):
    mesh = None if mesh is None else make_mesh(mesh)
    plain, adapted = load_pretrained(folder, mesh=mesh), load_pretrained(folder, mesh=mesh, lora=ADAPTERS)
    assert plain.spec.lora is None and adapted.spec.lora == ADAPTERS
    ids, mask = tokens(CASE, plain.spec.vocab_size)
    before, after = (models.logits(loaded.spec, loaded.params, ids, mask) for loaded in (plain, adapted))
    np.testing.assert_array_equal(before, after)
    own = lora.own(adapted.spec, adapted.params)
    assert set(own["layers"]["attention"]) == {f"{name}_lora_{x}" for name in ADAPTERS.targets for x in "ab"}
    base = lora.base(adapted.spec, adapted.params)
    assert jax.tree.structure(base) == jax.tree.structure(plain.params)


def test_a_config_asks_for_them(folder):
    config = FromPretrained(str(folder), lora=ADAPTERS)
    assert config.spec.lora == ADAPTERS and FromPretrained(str(folder)).spec.lora is None
