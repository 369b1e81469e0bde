"""Summaries of Reddit posts with Pythia 1B, as in the N+ implementation details: SFT → reward model → PPO.

    rlhf-jax run configs/tldr_pythia_1b.py      (8 GPUs of 80 GB in one host; estimated, not measured: a day)

Huang et al. 2024, after Stiennon et al. 2020. Of theirs: posts of at most 512 tokens, cut at a line break, and
summaries of 53; AdamW with eps 1e-5 and PyTorch's weight decay, learning rate 3e-6, cosine for the first two stages and
linear for PPO, no clipping of gradients; 92,858 comparisons once, in batches of 64; 1M episodes of PPO in batches of
512, 4 epochs of one step, KL at 0.05, a score of −1 without EOS, no whitening of rewards; temperature 0.7, and 0.01 in
evaluation.

The reward model's scores are shifted to mean 0 on the posts' own summaries, all of them.

Other than theirs: SFT packs several posts into a row, so that 80 rows hold about the 128 of their batch (an estimate);
the critic has an optimiser of its own, where theirs adds 0.1 times its loss.

Not run: neither the model nor the data fit where this was written. Checked there: the shapes and their layout on eight
devices, and the same stages on a tiny model with rows of the same form. The data sets are TRL's copies of OpenAI's,
huggingface.co/datasets/trl-lib/tldr (prompt, completion) and …/tldr-preference (prompt, chosen, rejected), whose
held-out comparisons include some of CNN/DM.
"""

from typing import Literal

from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import HuggingFace
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.kl import FixedKL
from rlhf_jax.models.sizes import PYTHIA_1B
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import EosPenalty, Shaping
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import MeshConfig

POSTS = HuggingFace("trl-lib/tldr", split="train", heldout="validation")
COMPARISONS = HuggingFace("trl-lib/tldr-preference", split="train", heldout="validation[:5%]")
NO_CLIPPING = 1e9
POST, SUMMARY, COMPARED = 512, 53, 169  # tokens of a post, of a summary, of one that people compared


def adamw(schedule: Literal["linear", "cosine"]) -> Optimizer:
    """The optimiser of all stages."""
    return Optimizer(
        learning_rate=3e-6, schedule=schedule, b2=0.999, eps=1e-5, weight_decay=0.01, clip_norm=NO_CLIPPING
    )


def get_config() -> Experiment:
    """Three stages; a later one names the earlier ones that it builds on."""
    return Experiment(
        model=FromPretrained("EleutherAI/pythia-1b-deduped", compute="bfloat16", remat="full", architecture=PYTHIA_1B),
        data=POSTS,
        mesh=MeshConfig(fsdp=8),
        stages={
            "sft": sft.Config(
                data=POSTS,
                row_length=1 + POST + SUMMARY,
                steps=1460,
                batch_size=80,
                heldout_rows=640,
                optimizer=adamw("cosine"),
            ),
            "reward_model": reward_model.Config(
                init="sft",
                pairs=COMPARISONS,
                length=1 + POST + COMPARED,
                normalize="mean",
                normalize_on="references",
                samples=125_000,
                steps=1451,
                batch_size=64,
                evaluate_every=200,
                optimizer=adamw("cosine"),
            ),
            "ppo": ppo.Config(
                policy="sft",
                reward="reward_model",
                critic="reward_model",
                data=POSTS,
                prompt_tokens=(1, POST),
                too_long="paragraph",
                completion_tokens=SUMMARY,
                sampling=Sampling(temperature=0.7),
                evaluation_sampling=Sampling(temperature=0.01),
                evaluation_prompts=1024,
                steps=1954,
                batch_size=512,
                epochs=4,
                minibatches=1,
                num_microbatches=8,
                kl=FixedKL(coef=0.05),
                shaping=Shaping(eos_penalty=EosPenalty(score=-1.0, how="replace")),
                optimizer=adamw("linear"),
                critic_optimizer=adamw("linear"),
                checkpoint_every=50,
            ),
        },
    )
