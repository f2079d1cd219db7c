#!/bin/bash
# A study on Slurm: a Ray cluster on the nodes of the allocation, and lowrank-tune in it.
#     sbatch scripts/cluster/slurm.sh run my_study.yaml
#     sbatch scripts/cluster/slurm.sh resume ID           # after the time limit, scancel --signal=TERM or a failure
# Submit it in this repository, after `scripts/setup`; the repository and the results lie on a file system that all nodes
# have. Two minutes before the time limit the study is asked to stop, and keeps what it has trained.
#SBATCH --job-name=lowrank-tune
#SBATCH --nodes=2                       # CHANGE
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8               # CHANGE
#SBATCH --gpus-per-node=1               # CHANGE, or remove it
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

results="${LOWRANK_TUNE_RESULTS:-$PWD/results}"
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
# Jobs that share a node must not meet: neither their ports, nor their folders, nor their tokens.
port=$((20000 + SLURM_JOB_ID % 10000))
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_MODE RAY_AUTH_TOKEN

start() {  # NODE ARGUMENT...: Ray on a node, until this script ends
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" ray start --block --disable-usage-stats \
        --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --temp-dir="/tmp/ray-$SLURM_JOB_ID-$1" "${@:2}" &
    started+=("$!")
}
wait_a_second() {  # and give up when Ray has ended on a node
    for process in "${started[@]}"; do
        kill -0 "$process" 2>/dev/null || { echo "Ray did not start on every node" >&2; exit 1; }
    done
    sleep 1
}
started=()
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT

start "$head" --head --port="$port" --include-dashboard=false
address="$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname -i | awk '{print $1}'):$port"
for node in "${nodes[@]:1}"; do
    until (exec 3<>"/dev/tcp/${address%:*}/$port") 2>/dev/null; do wait_a_second; done
    start "$node" --address="$address"
done
until [ "$(ray status --address="$address" 2>/dev/null | grep -c ' node_')" -ge "${#nodes[@]}" ]; do wait_a_second; done

lowrank-tune "$@" --address "$address" --results "$results" &
driver="$!"
# Slurm signals this shell; the first wait ends with the signal, the second with the study.
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code="$?"
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code="$?"
done
exit "$code"
