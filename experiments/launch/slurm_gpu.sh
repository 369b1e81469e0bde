#!/bin/bash
# A run on the GPUs of several hosts, by Slurm:
#
#   sbatch experiments/launch/slurm_gpu.sh configs/hh_llama_8b.py --workdir /shared/hh_llama_8b --mesh.fsdp 16
#
# The same command again goes on where the run stopped; /shared is a file system of all hosts, on which flock holds.
#SBATCH --job-name=rlhf-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8  # a process a GPU, so as many as the host has
#SBATCH --gpus-per-node=8    # not --gpus-per-task: a process sees all of its host's GPUs and takes the one of its number
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300    # five minutes before the end: all processes stop at one step, saved
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

# From Slurm's variables JAX knows the number of processes, this one's, and where process 0 waits for the others.
# A process that is lost ends the others, with a line that names it, after --peer_timeout seconds.
srun --label --kill-on-bad-exit=0 rlhf-jax run "$@" --peer_timeout 120
code=$?

# 143: stopped by SIGTERM, saved. 4, 134 and 137: a process was lost, and with it perhaps a host. The same job goes on.
case $code in
  4 | 134 | 137 | 143) [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
