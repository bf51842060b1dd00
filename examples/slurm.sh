#!/usr/bin/env bash
# Trains on several nodes under Slurm, one torchrun a node, one process a GPU:
#
#     sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 examples/slurm.sh --recipe imagenet-paper --data DIR --out SHARED/runs/mine
#
# --out is on a disk that all nodes share. Two minutes before the time is over Slurm sends SIGUSR1 to this script, and where the
# job is preempted SIGTERM; srun hands them to torchrun, and that to the workers, which save and leave. The job is then queued
# again and goes on from there.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

CRATE_FAST=${CRATE_FAST:-.venv/bin/python}
PORT=${PORT:-29500}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# In the background, for bash acts on a signal only once a command in the foreground has ended.
srun --kill-on-bad-exit=1 "$CRATE_FAST" -m torch.distributed.run \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:$PORT" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m crate_fast train --resume auto "$@" &
step=$!
signalled=""
trap 'signalled=USR1; kill -USR1 "$step" 2>/dev/null || true' USR1
trap 'signalled=TERM; kill -TERM "$step" 2>/dev/null || true' TERM

status=0
while :; do
  status=0
  wait "$step" || status=$?
  # A trapped signal ends `wait` too; the step is over once there is no such process.
  kill -0 "$step" 2>/dev/null || break
done
if [[ -n $signalled && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
