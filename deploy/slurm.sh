#!/bin/bash
# One learner with a GPU, and actors on CPU nodes, on SLURM: sbatch deploy/slurm.sh --config configs/atari_deep.py
#
# Its arguments are those of launch/local.py. The learner's node is the head of a Ray cluster that lives as long as the
# job; --actor.num-actors auto takes all CPUs of the other nodes. The checkout, its .venv (or VENV) and the workdir must
# be on a file system that all nodes share. A signal to the script saves the run, and the same command resumes it:
# scancel --batch --signal=TERM JOB. See docs/scaling.md.
#SBATCH --job-name=impala
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --gpus-per-node=1 --mem=32G
#SBATCH --time=24:00:00 --signal=B:TERM@120
#SBATCH hetjob
#SBATCH --nodes=4 --ntasks-per-node=1 --cpus-per-task=32 --mem=64G --exclusive

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
umask 077

token=$(mktemp "$PWD/.ray_token_XXXXXX") # Readable by you only, on the shared file system.
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0
folder=$(mktemp -d /tmp/impala_ray_XXXXXX) # Short, because paths of sockets are limited; other nodes use the same name.
address=$(hostname --ip-address | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000))
running=()

finish() {
  local status=$?
  ((status == 0 || status >= 128)) || tail -n 5 "$folder"/*.log >&2 || true
  for process in "${running[@]}"; do kill -TERM "$process" 2>/dev/null || true; done
  wait "${running[@]}" 2>/dev/null || true
  rm -rf "$token" "$folder"
}
trap finish EXIT

# Actors run on the other nodes only: CPUs of the learner's node feed the GPU.
ray start --head --node-ip-address="$address" --port="$port" --num-cpus=0 --num-gpus=0 --temp-dir="$folder/r" \
  --include-dashboard=false --disable-usage-stats --block >"$folder/head.log" 2>&1 &
running+=($!)
for ((second = 0; second < 60; second++)); do
  ray health-check --address="$address:$port" >/dev/null 2>&1 && break
  kill -0 "${running[0]}" 2>/dev/null || { cat "$folder/head.log" >&2; exit 1; }
  sleep 1
done

# A node that fails leaves the run; the others go on.
# shellcheck disable=SC2016  # Expanded on each node.
srun --het-group=1 --kill-on-bad-exit=0 bash -c '
  mkdir -p -m 700 "$2"
  trap "rm -rf \"$2\"" EXIT
  ray start --address="$1" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus=0 --disable-usage-stats --block &
  trap "kill -TERM $!" TERM INT
  wait $! || wait $!
' ray_node "$address:$port" "$folder" >"$folder/nodes.log" 2>&1 &
running+=($!)

status=0
python launch/local.py --runtime ray --ray-address "$address:$port" --actor.num-actors auto "$@" &
learner=$!
trap 'kill -TERM "$learner"' TERM INT
wait "$learner" || status=$?
while kill -0 "$learner" 2>/dev/null; do # A trapped signal ends `wait` before the learner has saved.
  status=0
  wait "$learner" || status=$?
done
exit "$status"
