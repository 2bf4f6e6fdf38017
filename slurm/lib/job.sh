#!/usr/bin/env bash
# The batch step of every script here: finds the checkout and a Python, then hands over to megatron_fapo/launch/job.py.
#   FAPO_HOME       the checkout, on a file system that all nodes share (default: where sbatch was called)
#   FAPO_CONFIG     more configuration files, separated by spaces, after the script's own (later ones win)
#   FAPO_OVERRIDES  more overrides, separated by spaces, which win over the arguments
#   FAPO_CONTAINER  an image for pyxis/enroot; FAPO_MOUNTS more mounts (same paths), FAPO_CONTAINER_PYTHON its Python (python3),
#                   FAPO_HOST_PYTHON the batch host's own, 3.9 or later (python3)
#   FAPO_CANARY_S   how long a file may take to show on another node, seconds (120)
#   FAPO_LOGS       where a job's own logs go (default: runs/slurm)
set -euo pipefail
cd "${FAPO_HOME:-$SLURM_SUBMIT_DIR}"
python=.venv/bin/python
if [ -n "${FAPO_CONTAINER:-}" ]; then
    python=${FAPO_HOST_PYTHON:-python3}  # only the standard library is used outside of the container
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || {
        echo "job.sh: $python of $(hostname) is older than 3.9: name another with FAPO_HOST_PYTHON" >&2
        exit 2
    }
elif [ ! -x "$python" ]; then
    echo "job.sh: no $PWD/$python: call sbatch in the checkout after 'make setup EXTRA=gpu', or set FAPO_HOME, or" \
        "FAPO_CONTAINER" >&2
    exit 2
fi
configs=()
for file in ${FAPO_CONFIG:-}; do configs+=(-c "$file"); done
# shellcheck disable=SC2086 # words of FAPO_OVERRIDES are separate overrides
exec "$python" -m megatron_fapo.launch.job "$@" "${configs[@]}" ${FAPO_OVERRIDES:-}
