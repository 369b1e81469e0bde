#!/bin/bash
# A run over several hosts by ssh, without a scheduler:
#
#   HOSTS="node1 node2" experiments/launch/ssh.sh configs/quickstart.py --workdir /shared/quickstart
#
# The first host is process 0, which writes. On all of them: the same package, this folder with the config at the same
# path, /shared as one file system, and a login without a password. Ctrl-C or SIGTERM here stops all at one step, saved.
#   PORT      of the first host, at which the processes meet (8476)
#   RLHF_JAX  the command on the hosts, such as /opt/venv/bin/rlhf-jax
#   SSH       how a command gets to a host ("ssh -o BatchMode=yes")
set -uo pipefail

read -ra hosts <<< "${HOSTS:?is empty: HOSTS=\"node1 node2\"}"
read -ra ssh <<< "${SSH:-ssh -o BatchMode=yes}"
command=${RLHF_JAX:-rlhf-jax}
place="--coordinator_address ${hosts[0]}:${PORT:-8476} --num_processes ${#hosts[@]}"
pid_file=/tmp/rlhf-jax.$(hostname).$$  # on the first host
folder=$(printf %q "$PWD") flags=$(printf '%q ' "$@")

# One process with the signal is enough: the others learn of it.
trap '"${ssh[@]}" "${hosts[0]}" "kill -TERM \$(cat $pid_file)" </dev/null' INT TERM

children=()
for i in "${!hosts[@]}"; do
  remote="cd $folder && { [ $i != 0 ] || echo \$\$ > $pid_file; } && exec $command run $flags $place --process_id $i"
  "${ssh[@]}" "${hosts[i]}" "$remote" </dev/null &
  children+=($!)
done

code=0
for child in "${children[@]}"; do
  while true; do
    wait "$child"
    ended=$?
    kill -0 "$child" 2>/dev/null || break  # else the trap cut the wait short
  done
  [ "$code" != 0 ] || code=$ended
done
"${ssh[@]}" "${hosts[0]}" "rm -f $pid_file" </dev/null
exit "$code"
