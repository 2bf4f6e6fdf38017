#!/usr/bin/env bash
# Baseline against FAPO, judged by the oracle and by a GenRM trained here, with a real pretrained model on one GPU.
#
#   [SEEDS="1 2"] [STEPS=100] [WARMUP_STEPS=120] [GSM8K=gsm8k-test.parquet] \
#       benchmarks/gpu/one_gpu_windtunnel.sh MODEL OUT [SECONDS]
#
# MODEL is an HF checkpoint (Qwen2, Qwen3 or Llama architecture) of about 0.5B parameters. After SECONDS what runs is
# asked to save and stop, and this exits 75: the same command goes on. A warm-up starts anew, so each of the two must fit
# into SECONDS. OUT/windtunnel/report.html is the result; with GSM8K (made by `fapo data prepare gsm8k`) also the
# accuracy of every trained policy on it, in OUT/gsm8k.
set -euo pipefail
model=$1 out=$2 limit=${3:-86400}
here=$(cd "$(dirname "$0")/../.." && pwd)
fapo=${FAPO:-$here/.venv/bin/fapo} python=${PYTHON:-$here/.venv/bin/python}
steps=${WARMUP_STEPS:-120}
read -ra seeds <<<"${SEEDS:-1}"
arms=(baseline fapo_oracle fapo_genrm)
mkdir -p "$out"

# Runs a command within what is left of the time; 75 when the time was over before or ended it.
within() {
    local left=$((limit - SECONDS)) code=0
    [ "$left" -gt 0 ] || exit 75
    timeout --preserve-status "$left" "$@" || code=$?
    [ "$code" -ne 143 ] || exit 75
    [ "$code" -eq 0 ] || exit "$code"
}

[ -f "$out/data/genrm.jsonl" ] || "$python" "$here/benchmarks/testbed_demonstrations.py" "$out/data"
for name in policy genrm; do
    [ -f "$out/$name-hf/model.safetensors.index.json" ] && continue
    rm -rf "$out/$name-warmup" "$out/$name-hf"
    within "$fapo" warmup -c "$here/examples/tiny_warmup_$name.yaml" \
        --data "$out/data/$name.jsonl" --out "$out/$name-hf" \
        device=gpu policy.model_path="$model" run_dir="$out/$name-warmup" data.max_prompt_tokens=1024 \
        training.steps="$steps" policy.optimizer.decay_steps="$steps" \
        policy.optimizer.lr=1.0e-5 policy.optimizer.min_lr=1.0e-6 policy.optimizer.warmup_steps=10
done
within "$fapo" bench windtunnel --out "$out/windtunnel" --jobs 1 --seeds "${seeds[@]}" --arms "${arms[@]}" \
    --steps "${STEPS:-100}" --policy "$out/policy-hf" --genrm "$out/genrm-hf" \
    -c "$here/examples/windtunnel_one_gpu.yaml"
[ -n "${GSM8K:-}" ] || exit 0
results=()
for arm in "${arms[@]}"; do
    run=$out/gsm8k/$arm
    results+=("$run")
    [ -f "$run/evaluation.json" ] && continue
    newest=$(find "$out/windtunnel/$arm-seed${seeds[0]}/checkpoints" -maxdepth 1 -name 'step_??????' | sort | tail -1)
    rm -rf "$run-hf"
    within "$fapo" convert megatron-to-hf --megatron "$newest" --out "$run-hf"
    within "$fapo" evaluate -c "$here/examples/windtunnel_one_gpu.yaml" policy.model_path="$run-hf" run_dir="$run" \
        data.eval.gsm8k="$GSM8K" data.eval_limit=256 genrm.judge_eval=false
done
"$fapo" report "${results[@]}"
