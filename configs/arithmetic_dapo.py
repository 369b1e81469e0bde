"""Sums with a checkable answer: SFT on them, then DAPO on whether the number is right, with no reward model.

    python -c "
    import itertools, json, random; random.seed(0)
    terms = list(itertools.product(range(10), repeat=3)); random.shuffle(terms)
    for t in terms:
        for text in (f' {sum(t)}', f' about {max(0, sum(t) + random.choice([-3, -2, -1, 1, 2, 3]))}'):
            print(json.dumps({'prompt': ' + '.join(map(str, t)) + ' =', 'completion': text, 'answer': sum(t)}))
    " > sums.jsonl
    rlhf-jax run configs/arithmetic_dapo.py      (2 CPU cores, minutes; figures of the method: experiments/methods)

Each sum is answered twice, rightly and by a guess that begins with "about"; the SFT policy does either, and DAPO has
it leave the guessing. The last fifth of the rows is held out. A group whose eight answers are all right or all wrong
teaches nothing and gives way to another prompt's. Other problems may stand in the file, with prompt, completion (for
SFT) and answer (for the reward) in each row.
"""

from rlhf_jax.algorithms import policy, sft
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import OverlongPenalty
from rlhf_jax.rewards.verifiers import AnswerChecker

SUMS = Jsonl("sums.jsonl", heldout=0.2)


def get_config() -> Experiment:
    """Two stages on the same rows."""
    return Experiment(
        model=Bundled(),
        data=SUMS,
        seed=0,
        stages={
            "sft": sft.Config(
                data=None,
                steps=450,
                batch_size=16,
                row_length=64,
                heldout_rows=16,
                evaluate_every=150,
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10),
            ),
            "dapo": policy.Config(
                **METHODS["dapo"] | {"overlong": OverlongPenalty(buffer=2), "dynamic_sampling": 2},
                policy="sft",
                reward=AnswerChecker(),
                data=SUMS,
                prompt_tokens=(1, 16),
                completion_tokens=6,
                evaluation_prompts=400,
                steps=30,
                batch_size=128,
                epochs=2,
                minibatches=2,
                optimizer=Optimizer(learning_rate=5e-5, schedule="linear"),
            ),
        },
    )
