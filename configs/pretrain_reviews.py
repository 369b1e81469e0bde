"""The base LM that the package bundles, from nothing: a 4,096-piece tokenizer and 3.4M parameters on movie reviews.

    rlhf-jax run configs/pretrain_reviews.py              (2 CPU cores, 55 minutes; expected held-out loss: 3.80)
    python configs/pretrain_reviews.py runs/pretrain_reviews      (puts the finished run into rlhf_jax/bundled)

16M tokens in rows of 128 that start at sentences; Muon on the blocks' matrices, AdamW elsewhere.
"""

import json
import sys
from pathlib import Path

from rlhf_jax.algorithms import pretrain
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.inference import open_run
from rlhf_jax.interop.pretrained import Scratch, write_bundle
from rlhf_jax.interop.tokenizers import SentencePiece
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


def main(workdir: Path) -> None:
    """Write what `Bundled()` reads: parameters in bfloat16, tokenizer, and a card that says what made them."""
    context = open_run(workdir).context
    made_by = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    figures = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))["pretrain"]
    experiment = made_by["experiment"]
    card = {
        "spec": {name: value for name, value in experiment["model"]["architecture"].items() if name != "class"},
        "heldout_loss": figures["heldout_loss"],
        "seed": experiment["seed"],
        "commit": made_by["commit"],
        "config": experiment,
        "versions": made_by["versions"],
    }
    assert isinstance(context.tokenizer, SentencePiece)  # Scratch has made it
    folder = Path(__file__).parent.parent / "rlhf_jax" / "bundled"
    write_bundle(folder, context.policy_params("pretrain"), context.tokenizer, card)
    print(f"{folder}: held-out loss {figures['heldout_loss']:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
