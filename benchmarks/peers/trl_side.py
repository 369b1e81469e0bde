"""TRL's side, through its own trainers: SFT, RM, DPO and GRPO of the newest, PPO of 1.12, the last that has it; and
decoding by transformers' `generate`. Weights, rows, lengths and schedule are those of the job.

The threads are the machine's, logs and reports are off, and numbers are float32 (with an accelerator those of the job).
"""

import contextlib
import itertools
import os
import tempfile
from types import SimpleNamespace

from common import BATCHES, SLOW, WARM, Clock, job, peak_memory, report, tokens

JOB = job()
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "DISABLE_MLFLOW_INTEGRATION": "1"}

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch.utils import flop_counter  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback  # noqa: E402

PAD, BOS, EOS = JOB["ends"]
ROWS, PROMPT, COMPLETION, LENGTH = (JOB[name] for name in ("rows", "prompt", "completion", "length"))
STEPS = WARM + JOB["turns"]
GPU = torch.cuda.is_available()
HALF = JOB["precision"] == "bfloat16"


KNOWN, ATEN = flop_counter.flop_registry, torch.ops.aten
KNOWN[ATEN._scaled_dot_product_flash_attention_for_cpu] = KNOWN[ATEN._scaled_dot_product_flash_attention]
KNOWN[ATEN._scaled_dot_product_flash_attention_for_cpu_backward] = KNOWN[
    ATEN._scaled_dot_product_flash_attention_backward
]
"""A CPU's attention is unknown to PyTorch's counter alone."""


class Watch(TrainerCallback):
    """A clock of a trainer's steps, which counts the first one's FLOPs."""

    def __init__(self):
        self.clock, self.flops = Clock(), 0
        self.counter = flop_counter.FlopCounterMode(display=False)

    def on_train_begin(self, args, state, control, **kwargs):
        """Count from here."""
        self.counter.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        """The clock's tick."""
        if not self.clock.ends:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops()
        if GPU:
            torch.cuda.synchronize()
        self.clock.tick()


def tokenizer():
    """A token each word, so that texts and tokens are the same thing."""
    whole = Tokenizer(models.WordLevel({word(i): i for i in range(JOB["vocab"])}, unk_token=word(PAD)))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": word(PAD), "bos_token": word(BOS), "eos_token": word(EOS)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, padding_side="left", **ends)


def word(token):
    """Its name."""
    return {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}.get(token, f"w{token}")


def texts(rows):
    """Words of rows, with a space at the end, where another text may follow."""
    made = ["".join(f"{word(token)} " for token in row) for row in rows]
    assert tokenizer()(made[0])["input_ids"] == rows[0]
    return made


def load(kind, **options):
    """The job's model, with the special tokens in its settings."""
    model = kind.from_pretrained(JOB["model"], dtype=torch.float32, **options)
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model.config.update(ends)
    if kind is AutoModelForCausalLM:
        model.generation_config.update(**ends)
    return model


def reward_model():
    """The job's trunk with a random head."""
    return load(AutoModelForSequenceClassification, num_labels=1)


def settings(**more):
    """What all trainers are told."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS,
        "learning_rate": SLOW,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": HALF,
        "use_cpu": not GPU,
        **more,
    }


def rows_of(**columns):
    """A data set."""
    return datasets.Dataset.from_dict(columns)


def sft():
    """Rows of tokens, each learnt from as a whole."""
    from trl import SFTConfig, SFTTrainer

    data = rows_of(input_ids=tokens(JOB, BATCHES * ROWS))
    args = SFTConfig(**settings(max_steps=STEPS, max_length=LENGTH))
    return SFTTrainer(load(AutoModelForCausalLM), args, train_dataset=data, processing_class=tokenizer())


def pairs():
    """Rows of tokens that are preferred, and others."""
    drawn = tokens(JOB, 2 * BATCHES * ROWS)
    return drawn[::2], drawn[1::2]


def rm():
    """Bradley-Terry's loss."""
    from trl import RewardConfig, RewardTrainer

    chosen, rejected = pairs()
    rejected = [c[:PROMPT] + r[PROMPT:] for c, r in zip(chosen, rejected, strict=True)]
    args = RewardConfig(**settings(max_steps=STEPS, max_length=LENGTH))
    data = rows_of(chosen_ids=chosen, rejected_ids=rejected)
    return RewardTrainer(reward_model(), args, train_dataset=data, processing_class=tokenizer())


def dpo():
    """DPO; the reference's log-probs have been read before."""
    from trl import DPOConfig, DPOTrainer

    chosen, rejected = pairs()
    data = rows_of(  # texts, for this trainer takes no tokens; it wants EOS at their ends
        prompt=texts([row[:PROMPT] for row in chosen]),
        chosen=[text.strip() for text in texts([[*row[PROMPT:-1], EOS] for row in chosen])],
        rejected=[text.strip() for text in texts([[*row[PROMPT:-1], EOS] for row in rejected])],
    )
    args = DPOConfig(**settings(max_steps=STEPS, max_length=LENGTH, precompute_ref_log_probs=True))
    return DPOTrainer(load(AutoModelForCausalLM), args=args, train_dataset=data, processing_class=tokenizer())


def grpo():
    """A step an iteration, its reward a network."""
    from trl import GRPOConfig, GRPOTrainer

    prompts = texts([row[:PROMPT] for row in tokens(JOB, BATCHES * ROWS)])
    args = GRPOConfig(
        **settings(max_steps=STEPS),
        num_generations=JOB["group"],
        steps_per_generation=1,
        num_iterations=JOB["epochs"],
        max_completion_length=COMPLETION,
        beta=0.04,
        temperature=1.0,
        top_k=0,
        use_vllm=False,
    )
    reads = tokenizer()
    return GRPOTrainer(
        load(AutoModelForCausalLM),
        reward_model(),
        args=args,
        train_dataset=rows_of(prompt=prompts),
        processing_class=tokenizer(),
        reward_processing_classes=reads,
    )


def ppo():
    """Policy and critic as networks of their own."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    data = rows_of(input_ids=[row[:PROMPT] for row in tokens(JOB, BATCHES * ROWS)])
    args = PPOConfig(
        **settings(),  # a minibatch is a step, not a part of one
        num_mini_batches=JOB["minibatches"],
        num_ppo_epochs=JOB["epochs"],
        total_episodes=STEPS * ROWS,
        response_length=COMPLETION,
        local_rollout_forward_batch_size=ROWS,
        num_sample_generations=0,
        stop_token="eos",
        temperature=1.0,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer(),
        model=load(AutoModelForCausalLM),
        ref_model=load(AutoModelForCausalLM),
        reward_model=reward_model(),
        value_model=reward_model(),
        train_dataset=data,
    )


def decode():
    """Not a trainer, but with a `train` of its own."""
    model = (
        load(AutoModelForCausalLM)
        .to(device="cuda" if GPU else "cpu", dtype=torch.bfloat16 if HALF else torch.float32)
        .eval()
    )
    prompts = torch.tensor([row[:PROMPT] for row in tokens(JOB, ROWS)], device=model.device)
    callbacks = []

    def train():
        for callback in callbacks:
            callback.on_train_begin(None, None, None)
        for _ in range(STEPS):
            with torch.inference_mode():
                made = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=COMPLETION,
                    do_sample=True,
                    top_k=0,
                )
            assert made.shape[1] == LENGTH
            for callback in callbacks:
                callback.on_step_end(None, None, None)

    return SimpleNamespace(train=train, add_callback=callbacks.append)


def read_lengths(trainer):
    """Counts the tokens of completions that a PPO trainer's reward model reads, a number a batch."""
    read = []

    def before(module, args, kwargs):
        read.append(int(kwargs["attention_mask"].sum()) - PROMPT * len(kwargs["attention_mask"]))

    trainer.reward_model.model.register_forward_pre_hook(before, with_kwargs=True)
    return read


def main():
    """Print the job's measurement."""
    torch.set_num_threads(JOB["threads"])
    kind = JOB["kind"]
    with contextlib.redirect_stdout(None):
        trainer, watch = globals()[kind](), Watch()
        trainer.add_callback(watch)
        read = read_lengths(trainer) if kind == "ppo" else []
        trainer.train()
    learnt = {"sft": ROWS * LENGTH, "rm": 2 * ROWS * LENGTH, "dpo": 2 * ROWS * LENGTH}.get(kind, ROWS * COMPLETION)
    if read:
        timed = list(itertools.islice(read, WARM, None))
        learnt = sum(timed) / len(timed)
    peak = torch.cuda.max_memory_allocated() if GPU else peak_memory()
    packages = ("torch", "transformers", "trl")
    report(watch.clock, tokens=learnt, flops=watch.flops, peak=peak, packages=packages)


if __name__ == "__main__":
    main()
