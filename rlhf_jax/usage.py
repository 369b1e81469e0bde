"""What the command says of itself, where a config's fields are not listed."""

USAGE = """usage: rlhf-jax COMMAND …

  run CONFIG [--workdir DIR] [--FIELD VALUE …]             train an experiment, or go on with it
  sweep CONFIG --seeds 8 [--vary FIELD=A,B …] [--to DIR]   train it with many seeds and numbers, side by side
  sample WORKDIR --prompt TEXT [--n 4] [--json]            complete a prompt with a run's newest policy, or a .gguf file
  score WORKDIR --input FILE [--json]                      try a run's reward model on a JSONL file
  report WORKDIR                                           draw report.html again
  plan CONFIG --topology v5e:16x16 [--FIELD VALUE …]       memory and time on a TPU pod, without one
  export WORKDIR --to DIR [--stage ppo] [--adapter]        write a stage's model for transformers, or its LoRA for PEFT
  bench [--sizes tiny,small] [--what sft,ppo,…] [--json]   time the stages' steps, beside TRL's and Tunix's

CONFIG is a Python file with get_config(), such as configs/quickstart.py; WORKDIR the folder of a run, by default
runs/<name of the config>. `rlhf-jax run CONFIG --help` lists every field, `rlhf-jax COMMAND --help` says more.
"""

RUN_USAGE = """usage: rlhf-jax run CONFIG [--workdir DIR] [--FIELD VALUE …]

Train the stages of an experiment, in order. The same command again goes on where the run stopped.

  rlhf-jax run configs/quickstart.py --help                     what the config does, and all its fields
  rlhf-jax run configs/quickstart.py --stages.ppo.kl.coef 0.1   with one field changed
"""

SWEEP_USAGE = """usage: rlhf-jax sweep CONFIG --seeds N [--vary FIELD=A,B …] [--to DIR] [--FIELD VALUE …]

Train an experiment with every seed and every combination of values, and compare these.

  rlhf-jax sweep configs/quickstart.py --seeds 8 --vary stages.ppo.kl.coef=0.01,0.05,0.2

makes 24 runs: three prices of KL, each with the seeds 0 to 7. Stages before PPO do not see the price, so they are
trained once a seed. Below runs/quickstart-sweep each run is a workdir, such as seed=0,kl.coef=0.05; report.html there
says which price is best, with means, standard errors and curves over seeds, and summary.json has the same figures.
After a kill the same command goes on.

  … --seeds 4 --vary stages.ppo.kl.coef=0.01,0.05 --vary stages.ppo.lam=0.9,1.0     every price with every λ: 16 runs
  … --seeds 8 --stages.ppo.steps 20                                                 a field changed for all runs
  … --seeds 8 --mesh.replica 4                                                      on 4 groups of devices, 2 runs each

  --seeds       how many, from the experiment's own seed on (1)
  --vary        a field that is a number, and its values; each further --vary multiplies the runs
  --to          the folder (runs/<name of the config>-sweep)
  --calls       vmap: the compiled calls of all runs at once; turns: one after another, by one program for all, and
                on a CPU whole runs, a process a core; auto (the default): turns on a CPU, else vmap
  --mesh.replica  groups that the devices are split into, each with its share of the runs (1); it must divide the
                devices and the number of runs
  --FIELD       any field of the experiment, for all runs; `rlhf-jax run CONFIG --help` lists them
"""

PLAN_USAGE = """usage: rlhf-jax plan CONFIG --topology KIND:SHAPE [--FIELD VALUE …]

Compile an experiment's programs for a TPU pod, on a machine without any: does it fit, what does it send, how long may
it take. Nothing is run, and no weights, tokenizer or data are read.

  rlhf-jax plan configs/hh_llama_8b.py --topology v5p:4x4x4 --mesh.fsdp 64
  --topology    v4, v5e, v5p, v6e or tpu7x, and the chips along each axis of a slice
  --num_slices  slices of that shape, joined by the data centre's network
  --stage       one stage alone
  --fit         search mesh, microbatches and remat for the fastest that fits, and print it with its flags
  --tries       how many settings --fit compiles at most (12)
  --json        one line of JSON on stdout
  --FIELD       any field of the experiment; `rlhf-jax run CONFIG --help` lists them
"""
