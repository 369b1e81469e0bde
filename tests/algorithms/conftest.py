"""A small model and tokenizer on the real reviews, in a workdir of the test's own."""

import dataclasses

import jax
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.reviews import MovieReviews, Reviews
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.models import ModelSpec
from rlhf_jax.sharding import make_mesh

SPEC = ModelSpec(vocab_size=512, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=64)


@dataclasses.dataclass(frozen=True)
class SomeReviews(MovieReviews):
    """A fifteenth of the reviews, so that a test is quick."""

    def load(self) -> Reviews:
        whole = super().load()
        return Reviews(whole.train[::15], whole.validation[::15], whole.test[::15])


@pytest.fixture(scope="package", autouse=True)
def _compile_once(tmp_path_factory):
    """Stages that are run again, as after a kill, find their programs compiled, as they would in a user's run."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("xla")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def pretrained():
    reviews = SomeReviews().load()
    tokenizer = train_sentencepiece((review.text for review in reviews.train), vocab_size=SPEC.vocab_size)
    return Pretrained(SPEC, sharding.unbox(models.init(SPEC, jax.random.key(0))), tokenizer)


@pytest.fixture(scope="session")
def some_reviews():
    return SomeReviews()


@pytest.fixture
def make_context(tmp_path, pretrained, some_reviews, monkeypatch):
    """Contexts in folders of `tmp_path`; the gold classifier is kept beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name="run", *, mesh=None, seed=0):
        mesh = sharding.single_device_mesh() if mesh is None else make_mesh(mesh)
        return Context(tmp_path / name, seed, mesh, pretrained, some_reviews)

    return make


def put_stages(context, *, seed=3):
    """Write the parameters of an "sft" and a "reward_model" stage, as if these had run."""
    trunk = context.policy_params("base")
    save_params(context.stage_dir("sft") / "params", trunk)
    reward = models.init_with_head(SPEC, jax.random.key(seed), trunk)
    save_params(context.stage_dir("reward_model") / "params", sharding.unbox(reward))
