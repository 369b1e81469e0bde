"""What changes while a policy learns from its own completions, and how it begins."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import kl, models, normalizer
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.policy_gradient import PolicyGradient
from rlhf_jax.models import lora, stacking
from rlhf_jax.models.heads import HEAD, box
from rlhf_jax.normalizer import Moments
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import Shaping
from rlhf_jax.train_step import sharded_state
from rlhf_jax.types import Metrics, Params, Rollout, TrainState


class PolicyState(flax.struct.PyTreeNode):
    """What changes in every method: policy, KL controller, and where there are such the policy's moving average and the
    moments of all scores so far.
    """

    policy: TrainState
    kl: kl.KLState
    average: Params | None
    moments: Moments | None

    @property
    def final(self) -> Params:
        """The policy's own parameters that a stage ends with, without a value head."""
        params = self.policy.params if self.average is None else self.average
        return {name: part for name, part in params.items() if name != HEAD}


def over_steps(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any, *, apart: bool) -> tuple[Any, Any]:
    """`jax.lax.scan`; `apart`: layers lie apart from the first step to the last, so that no step cuts its weights out
    of stacks and lays their gradients together.
    """
    state, found = jax.lax.scan(step, stacking.apart(state) if apart else state, rows)
    return stacking.together(state) if apart else state, found


def may_lie_apart(algorithm: PolicyGradient, *optimizers: Optimizer) -> bool:
    """Whether layers may in `over_steps`: for the models, what updates them, and what holds their parameters."""
    held = algorithm.config.ewc is not None
    return not held and stacking.may_lie_apart(algorithm.spec) and all(one.elementwise for one in optimizers)


def copied(params: Params) -> Params:
    """The same arrays once more, in the same shards; shapes as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else x.copy(), params)


def averaged(average: Params | None, policy: TrainState, decay: float | None) -> Params | None:
    """The moving average after an iteration; None where there is none."""
    if average is None or decay is None:
        return None
    return jax.tree.map(lambda a, p: (a + (1 - decay) * (p - a)).astype(p.dtype), average, policy.params)


def first_moments(shaping: Shaping, context: Context) -> Moments | None:
    """Those of no scores, on every device; None where scores are not normalised."""
    return None if shaping.normalize == "none" else context.replicated(Moments())


def with_scores(moments: Moments | None, newest: Rollout) -> tuple[Moments | None, Metrics]:
    """The moments after the finite scores of an iteration's rollout too, and what they are.

    Groups that dynamic sampling has replaced are not in it; a greedy baseline's and a reference's completions are not
    used.
    """
    if moments is None:
        return None, {}
    finite = jnp.isfinite(newest.scores)  # what is not, the loss sees: guard counts the step
    used = finite if newest.used is None else finite & newest.used
    moments = normalizer.update(moments, newest.scores, used)
    return moments, {"running_mean": moments.mean, "running_std": jnp.sqrt(moments.variance)}


def policy_state(
    algorithm: PolicyGradient, context: Context, name: str, hyper: dict[str, float], *, head: Params | None = None
) -> TrainState:
    """The policy at the start of training, in shards, with a value head if one is given; `hyper` beside its learning
    rate and the prices of what it is asked to keep.
    """
    c = algorithm.config
    kept = {name: part.coef for name, part in (("ptx_coef", c.ptx), ("ewc_coef", c.ewc)) if part is not None}
    params = context.policy_params(c.policy)
    boxes = lora.own(context.spec, jax.eval_shape(partial(models.init, context.spec), jax.random.key(0)))
    if head is not None:
        boxes[HEAD] = jax.eval_shape(partial(models.init_with_head, context.spec), jax.random.key(0))[HEAD]
        params = {**params, HEAD: head}
    return sharded_state(
        context.mesh,
        partial(box, boxes=boxes),
        params,
        algorithm.policy_optimizer,
        {"learning_rate": c.optimizer.learning_rate, **kept, **hyper},
        context.key(name),
        master=c.optimizer.master,
    )
