#!/usr/bin/env bash
# Baseline against FAPO, judged by the oracle and by a GenRM trained here, with a real pretrained model on one GPU.
#
#   benchmarks/one_gpu_windtunnel.sh MODEL OUT [SECONDS]
#
# MODEL is an HF checkpoint (Qwen2, Qwen3 or Llama architecture) of about 0.5B parameters. After SECONDS what runs is asked
# to save and stop, and this exits 75: the same command goes on. OUT/windtunnel/report.html is the result.
set -euo pipefail
model=$1 out=$2 limit=${3:-86400}
here=$(cd "$(dirname "$0")/.." && pwd)
fapo=${FAPO:-$here/.venv/bin/fapo} python=${PYTHON:-$here/.venv/bin/python}
began=$SECONDS
mkdir -p "$out"

left() { echo $((limit - (SECONDS - began))); }

[ -f "$out/data/genrm.jsonl" ] || "$python" "$here/benchmarks/testbed_demonstrations.py" "$out/data"
for name in policy genrm; do
    [ -f "$out/$name-hf/config.json" ] && continue
    rm -rf "$out/$name-warmup"
    timeout --preserve-status "$(left)" "$fapo" warmup -c "$here/examples/tiny_warmup_$name.yaml" \
        --data "$out/data/$name.jsonl" --out "$out/$name-hf" \
        device=gpu policy.model_path="$model" run_dir="$out/$name-warmup" data.max_prompt_tokens=1024 \
        training.steps="${WARMUP_STEPS:-120}" policy.optimizer.decay_steps="${WARMUP_STEPS:-120}" \
        policy.optimizer.lr=1.0e-5 policy.optimizer.min_lr=1.0e-6 policy.optimizer.warmup_steps=10
done
timeout --preserve-status "$(left)" "$fapo" bench windtunnel --out "$out/windtunnel" --jobs 1 --seeds "${SEEDS:-1}" \
    --arms baseline fapo_oracle fapo_genrm --steps "${STEPS:-100}" \
    --policy "$out/policy-hf" --genrm "$out/genrm-hf" -c "$here/examples/windtunnel_one_gpu.yaml"
