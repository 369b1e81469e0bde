"""The base LM that the package bundles, from nothing: a 4,096-piece tokenizer and 3.4M parameters on movie reviews.

    rlhf-jax run configs/pretrain_reviews.py      (2 CPU cores, about 70 minutes; expected held-out loss: below 4.0)

Muon on the blocks' matrices, AdamW elsewhere; rows of 128 tokens that start at sentences. `python
configs/pretrain_reviews.py WORKDIR` turns the finished run into what rlhf_jax/bundled holds.
"""

from rlhf_jax.algorithms import pretrain
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """One stage, from random parameters."""
    return Experiment(
        model=Scratch(
            ModelSpec(
                vocab_size=4096,
                d_model=256,
                n_layers=3,
                n_heads=4,
                n_kv_heads=4,
                head_dim=64,
                d_ff=704,
                max_len=128,
                tied=True,
                qk_norm=True,
                unroll=3,
            )
        ),
        data=MovieReviews(),
        seed=0,
        stages={
            "pretrain": pretrain.Config(
                steps=4_000,
                batch_size=32,
                row_length=128,
                heldout_rows=256,
                evaluate_every=100,
                checkpoint_every=100,
                optimizer=Optimizer(
                    kind="muon", learning_rate=0.02, adam_share=0.5, warmup_steps=50, schedule="linear", final_share=0.0
                ),
            ),
        },
    )
