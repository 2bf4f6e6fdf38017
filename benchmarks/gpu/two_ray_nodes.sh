#!/usr/bin/env bash
# A run over two Ray nodes of one card each on a host of two GPUs: the policy on the first, engine and GenRM on the
# second, so that each refit goes from node to node as messages, checksums compared every time.
#
#   benchmarks/gpu/two_ray_nodes.sh MODEL PROMPTS OUT [section.key=value ...]
#
# MODEL is an HF checkpoint of about 0.5B parameters, policy and judge alike; PROMPTS rows in the recipe's schema.
set -euo pipefail
model=$1 prompts=$2 out=$3
shift 3
here=$(cd "$(dirname "$0")/../.." && pwd)
fapo=${FAPO:-$here/.venv/bin/fapo} python=${PYTHON:-$here/.venv/bin/python}
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_raylet_start_wait_time_s=120 RAY_ADDRESS=127.0.0.1:23456
start=("$python" -m ray.scripts.scripts start --disable-usage-stats --num-gpus=1 --node-ip-address=127.0.0.1)
trap '"$python" -m ray.scripts.scripts stop --force >/dev/null 2>&1' EXIT
CUDA_VISIBLE_DEVICES=0 "${start[@]}" --head --port=23456 --include-dashboard=false \
    --resources='{"train": 1000, "fapo_node_0": 1}'
CUDA_VISIBLE_DEVICES=1 "${start[@]}" --address="$RAY_ADDRESS" \
    --resources='{"rollout": 1000, "genrm": 1000, "fapo_node_1": 1}'
cache='{kv_cache_memory_bytes: 20000000000}'
"$fapo" train -c "$here/examples/one_gpu.yaml" run_dir="$out" gpu_share=0.5 \
    cluster.train_nodes=1 cluster.rollout_nodes=1 cluster.gpus_per_node=1 \
    policy.model_path="$model" genrm.model_path="$model" "data.train=[$prompts]" data.question_key=null \
    data.answer_key=null rollout.max_response_tokens=256 reward.overlong.buffer_tokens=64 genrm.max_model_len=2048 \
    genrm.max_tokens=256 reward.max_unscored_share=1 "rollout.vllm=$cache" "genrm.vllm=$cache" \
    weight_sync.verify_every=1 weight_sync.bucket_mb=64 training.steps=16 training.checkpoint.every_steps=8 "$@"
"$python" "$here/benchmarks/run_table.py" "$out" --skip 2
