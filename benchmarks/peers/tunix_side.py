"""google-tunix's side, through its own trainers and sampler: SFT, DPO, PPO and decoding.

Weights, rows, lengths and schedule are those of the job. DPO reads its reference at every step, for Tunix has no way to
read it before; PPO's minibatches are in one order. It has no trainer of reward models, and its GRPO takes no network's
scores.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from common import BATCHES, SLOW, WARM, Clock, job, peak_memory, report, tokens

JOB = job()
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.models.llama3 import params as llama_params  # noqa: E402
from tunix.sft import hooks, peft_trainer  # noqa: E402
from tunix.sft import utils as sft_utils  # noqa: E402

PAD, BOS, EOS = JOB["ends"]
ROWS, PROMPT, COMPLETION, LENGTH = (JOB[name] for name in ("rows", "prompt", "completion", "length"))
STEPS = WARM + JOB["turns"]
GPU = jax.default_backend() != "cpu"
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
NEVER = 10**9
OPTIMIZER = {"learning_rate": SLOW, "b2": 0.95}


class Words:
    """A tokenizer of words w0, w1, …: a token each, so that texts and tokens are the same thing."""

    def encode(self, text, **_):
        """Tokens of a text."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        """The text of tokens."""
        return " ".join(f"w{i}" for i in ids)

    def bos_id(self):
        """That of the job."""
        return BOS

    def eos_id(self):
        """That of the job."""
        return EOS

    def pad_id(self):
        """That of the job."""
        return PAD


class Watch(hooks.TrainingHooks):
    """A clock of a trainer's steps, each when its loss is there."""

    def __init__(self):
        self.clock = Clock()

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        """The clock's tick."""
        jax.block_until_ready(train_loss)
        if len(self.clock.ends) < STEPS:  # a last one comes with the trainer's end
            self.clock.tick()

    def on_train_start(self, train_ctx):
        """Nothing."""

    def on_train_end(self, train_ctx):
        """Nothing."""

    def on_train_step_start(self, train_ctx):
        """Nothing."""

    def on_eval_step_start(self, train_ctx):
        """Nothing."""

    def on_eval_step_end(self, train_ctx, eval_loss):
        """Nothing."""


def take_segments():
    """Let Llama3 take the argument that Tunix 0.1.7's own RL passes and its Llama3 lacks; rows are not packed here."""
    call = llama.Llama3.__call__

    def called(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        return call(self, input_tokens, positions, cache, attention_mask)

    llama.Llama3.__call__ = called


def load():
    """The job's model, in its type."""
    fields = json.loads((Path(JOB["model"]) / "config.json").read_text(encoding="utf-8"))
    config = llama.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=fields["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
    )
    dtype = jnp.bfloat16 if JOB["precision"] == "bfloat16" else jnp.float32
    return llama_params.create_model_from_safe_tensors(JOB["model"], config, MESH, dtype=dtype)


def optimizer():
    """AdamW with clipping."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(**OPTIMIZER))


def stops():
    """A trainer reports a step's loss after the next one, so it takes one more."""
    return {"eval_every_n_steps": NEVER, "max_steps": STEPS + 1}


def masked(rows):
    """What Tunix's trainers read of whole rows."""
    mask = np.ones(rows.shape, bool)
    return {
        "input_tokens": rows,
        "input_mask": mask,
        "positions": sft_utils.build_positions_from_mask(mask),
        "attention_mask": sft_utils.make_causal_attn_mask(mask),
    }


def batches(make):
    """As many batches as a trainer takes."""
    return [make(i % BATCHES) for i in range(STEPS + 1)]


def sft(watch):
    """Rows of tokens, each learnt from as a whole."""
    drawn = np.asarray(tokens(JOB, BATCHES * ROWS)).reshape(BATCHES, ROWS, LENGTH)
    trainer = peft_trainer.PeftTrainer(load(), optimizer(), peft_trainer.TrainingConfig(**stops()))
    trainer.with_gen_model_input_fn(lambda x: masked(x.input_tokens))
    trainer.with_training_hooks(watch)
    made = batches(lambda i: peft_trainer.TrainingInput(drawn[i], np.ones(drawn[i].shape, bool)))
    trainer.train(made)
    return ROWS * LENGTH


def dpo(watch):
    """DPO; its reference is read at each step."""
    from tunix.sft.dpo import dpo_trainer

    drawn = np.asarray(tokens(JOB, 2 * BATCHES * ROWS)).reshape(BATCHES, ROWS, 2, LENGTH)
    config = dpo_trainer.DPOTrainingConfig(**stops(), beta=0.1)
    trainer = dpo_trainer.DPOTrainer(load(), load(), optimizer(), config)
    trainer.with_training_hooks(watch)

    def batch(i):
        parts = drawn[i, :, 0, :PROMPT], drawn[i, :, 0, PROMPT:], drawn[i, :, 1, PROMPT:]
        named = zip(("prompt", "chosen", "rejected"), parts, strict=True)
        both = {name: {f"{name}_ids": x, f"{name}_mask": np.ones(x.shape, bool)} for name, x in named}
        return dpo_trainer.TrainingInput(**both["prompt"], **both["chosen"], **both["rejected"])

    trainer.train(batches(batch))
    return 2 * ROWS * LENGTH


def prompts(rows):
    """Their texts."""
    return [Words().decode(row[:PROMPT]) for row in rows]


def decode(watch):
    """Tunix's own sampler."""
    from tunix.generate import sampler

    model = load()
    shape = {"num_layers": model.config.num_layers, "num_kv_heads": model.config.num_kv_heads}
    cache = sampler.CacheConfig(cache_size=LENGTH, head_dim=model.config.head_dim, **shape)
    made = sampler.Sampler(model, Words(), cache)
    for i in range(STEPS):
        out = made(
            prompts(tokens(JOB, ROWS)),
            max_generation_steps=COMPLETION,
            max_prompt_length=PROMPT,
            temperature=1.0,
            top_p=1.0,
            seed=i,
        )
        assert all(len(row) == COMPLETION for row in out.tokens)
        watch.clock.tick()
    return ROWS * COMPLETION


def ppo(watch):
    """Actor, critic, reference and reward model, each a network of its own."""
    from tunix.rl import rl_cluster, utils
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout import base_rollout

    take_segments()
    actor = load()
    training = rl_cluster.RLTrainingConfig(
        eval_every_n_steps=NEVER,
        max_steps=NEVER,
        actor_optimizer=optimizer(),
        critic_optimizer=optimizer(),
        mini_batch_size=ROWS // JOB["minibatches"],
        train_micro_batch_size=ROWS // JOB["minibatches"],
        rollout_micro_batch_size=ROWS,
        compute_logps_micro_batch_size=ROWS,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=COMPLETION,
        max_prompt_length=PROMPT,
        kv_cache_size=LENGTH,
        temperature=1.0,
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=utils.create_critic_model(actor, seed=1),
        reward=utils.create_critic_model(actor, seed=2),
        reference=load(),
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: MESH for role in rl_cluster.Role}, training_config=training, rollout_config=rollout
        ),
    )
    config = ppo_learner.PPOConfig(num_iterations=JOB["epochs"], kl_method="kl")
    learner, read, made, marks = ppo_learner.PPOLearner(cluster, config), cluster.generate, [], []
    drawn = prompts(tokens(JOB, BATCHES * ROWS))

    def generate(*args, **kwargs):
        out = read(*args, **kwargs)
        made.append(sum(len(row) for row in out.tokens))
        return out

    def rows():
        for i in range(STEPS + 1):
            start = i % BATCHES * ROWS
            yield {"prompts": drawn[start : start + ROWS]}
            if i < STEPS:
                watch.clock.tick()
                marks.append(sum(made))

    cluster.generate = generate
    learner.train(rows())
    return (marks[-1] - marks[WARM - 1]) / JOB["turns"]


KINDS = {"sft": sft, "dpo": dpo, "decode": decode, "ppo": ppo}


def main():
    """Print the job's measurement."""
    logging.disable(logging.INFO)
    os.chdir(tempfile.mkdtemp())
    watch = Watch()
    with contextlib.redirect_stdout(sys.stderr), MESH:
        learnt = KINDS[JOB["kind"]](watch)
    peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] if GPU else peak_memory()
    packages = ("google-tunix", "jax", "jaxlib", "flax")
    report(watch.clock, tokens=learnt, flops=0, peak=peak, packages=packages)


if __name__ == "__main__":
    main()
