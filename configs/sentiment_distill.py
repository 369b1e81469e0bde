"""The quickstart, then two students of its PPO policy: on-policy by the reverse KL, offline by the forward KL.

    rlhf-jax run configs/sentiment_distill.py      (2 CPU cores, 8 minutes; figures of the method: experiments/methods)

Both students start from the SFT policy. The first learns from completions of its own, what the teacher thinks of each
next token (GKD, Agarwal et al. 2023; the reverse KL as in Gu et al. 2023), the second from the teacher's completions;
the third divergence is `jensen_shannon`, with its `beta`. Each summary has the KL from student to teacher, and the gold
score of the SFT policy, of the student, and of the teacher.
"""

import dataclasses
from pathlib import Path

from rlhf_jax.algorithms import distill
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.optim import Optimizer

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py"))


def get_config() -> Experiment:
    """The quickstart's stages and two more."""
    on_policy = distill.Config(
        student="sft",
        teacher="ppo",
        divergence="reverse_kl",
        steps=30,
        batch_size=128,
        optimizer=Optimizer(learning_rate=4e-4, schedule="linear"),
    )
    offline = dataclasses.replace(on_policy, divergence="forward_kl", student_share=0.0)
    return dataclasses.replace(QUICKSTART, stages={**QUICKSTART.stages, "on_policy": on_policy, "offline": offline})
