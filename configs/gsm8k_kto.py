"""Thumbs up and down by KTO on the bundled LM: solutions of grade-school problems, marked right or wrong, or yours.

    rlhf-jax run configs/gsm8k_kto.py --data.path thumbs.jsonl      (one CPU core, 2 minutes)

The file has a row a line with question, solution and is_correct (true or false), as the example solutions of GSM8K
(Cobbe et al. 2021, github.com/openai/grade-school-math) have them; other names go by `--data.fields.prompt` and so on.

Expected of 2,000 of these, the last fifth held out: the implicit reward tells right from wrong solutions with an area
under the ROC curve of 0.66, 95% interval over problems 0.58 to 0.73; a constant 0.50, length alone 0.61. The held-out
loss is 0.536 after half of the steps and 0.520 after all. The model has seen no mathematics and reads 128 tokens, so
that nine of ten rows lose the start of their problem.
"""

from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """One stage, on the experiment's own rows."""
    return Experiment(
        model=Bundled(),
        data=Jsonl(
            "gsm8k_thumbs.jsonl",
            heldout=0.2,
            fields={"prompt": "question", "completion": "solution", "label": "is_correct"},
        ),
        seed=0,
        stages={
            "kto": preference.Config(
                init="base",
                pairs=None,
                losses=(Term("kto", desirable_weight=1.6),),
                length=128,
                steps=100,
                batch_size=16,
                evaluate_every=50,
                evaluation_prompts=32,
                optimizer=Optimizer(learning_rate=1e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
