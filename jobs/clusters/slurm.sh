#!/usr/bin/env bash
# A run on SLURM: Ray starts on all nodes of the allocation, the run on the first of them, and all ends with it.
#
#   sbatch jobs/clusters/slurm.sh JOB.yaml /shared/runs/NAME [further words of tracer run]
#
# The second word is the run folder, on storage that all nodes see. Killed by the time limit or requeued: submit the
# same line again, and it resumes. VENV is where tracer is installed (.venv); keys belong in your shell's profile or
# in ~/.cache/huggingface/token, never here.
#SBATCH --job-name=tracer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Whole nodes: at its end, ray symmetric-run stops every Ray process of yours that it finds on them.
#SBATCH --exclusive
set -euo pipefail

job=${1:?usage: sbatch slurm.sh JOB.yaml RUN_FOLDER [further words of tracer run]}
out=${2:?usage: sbatch slurm.sh JOB.yaml RUN_FOLDER [further words of tracer run]}
shift 2
venv=${VENV:-.venv}
if [ -f "$venv/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
fi

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Some nodes have several addresses; Ray takes the first.
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}')
address=$ip:$((6379 + SLURM_JOB_ID % 1000))

# One worker a GPU; without GPUs, tracer run chooses for itself.
share=()
if [ "$gpus" -gt 0 ]; then
    share=(--workers "$((nodes * gpus))" --gpus-per-worker 1)
fi
export RAY_USAGE_STATS_ENABLED=0
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    ray symmetric-run --address "$address" --min-nodes "$nodes" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" -- \
    python -m tracer run "$job" --out "$out" --ray "$address" ${share[@]+"${share[@]}"} "$@"
