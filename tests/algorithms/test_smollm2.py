"""PPO's networks on a real model: SmolLM2-135M with adapters on one frozen base, against four models of their own."""

import gc

import jax
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo
from rlhf_jax.algorithms.context import Context
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.models.spec import Lora
from tests.oracles_hf.small_models import UnavailableError, fetch

for package in ("gguf", "tokenizers", "jinja2"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow


def held_bytes(folder, path, lora):
    """All that lives on the device once PPO's networks and optimisers are made, each buffer counted once."""
    mesh = sharding.single_device_mesh()
    config = FromPretrained(str(path), lora=lora)
    model = config.load(data=MovieReviews(), workdir=folder, seed=0, mesh=mesh)
    context = Context(folder, 0, mesh, model, MovieReviews())
    head = models.init_with_head(model.spec, jax.random.key(0), context.policy_params("base"))
    save_params(context.stage_dir("reward_model") / "params", sharding.unbox(head))
    del head
    algorithm = ppo.Algorithm(ppo.Config(policy="base"), model.spec, eos_id=2, pad_id=3)
    networks = (
        ppo.initial_state(algorithm, context, "ppo"),
        iterations.frozen(context, policy="base", reward="reward_model"),
    )
    if lora is None:  # in place by now; with adapters it is the base that all share
        del model, context
    gc.collect()
    buffers = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if x.dtype != jax.random.key(0).dtype}
    assert jax.tree.leaves(networks)
    return sum(buffers.values())


def test_adapters_on_one_base_take_a_third_of_four_models_at_most(tmp_path):
    try:
        path = fetch("smollm2")
    except UnavailableError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    apart = held_bytes(tmp_path / "apart", path, None)
    gc.collect()
    hydra = held_bytes(tmp_path / "hydra", path, Lora(rank=16, alpha=32))
    print(f"four models {apart / 1e6:.0f} MB, adapters on one base {hydra / 1e6:.0f} MB: {hydra / apart:.3f}")
    assert apart > 4 * 135e6 * 4 * 2 * 0.95  # four in float32, two of them with two moments
    assert hydra < 0.35 * apart
