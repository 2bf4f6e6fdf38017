#!/usr/bin/env bash
# Train steps of the policy alone, for MFU: a row of JSON for each case that this host has the GPUs for.
#
#   benchmarks/gpu/mfu.sh OUT [section.key=value ...]     # OUT/mfu.json, and a profile of kernels for each case
#
#   case       GPUs   what                                                              goal (MFU)
#   one        1      Qwen3-8B with 12 layers (3.6B), 65,536 tokens a step              0.62
#   two        2      Qwen3-8B, TP2+SP, 131,072 tokens                                  0.52
#   four       4      Qwen2.5-32B, TP4+SP, 65,536 tokens, moments in bfloat16           0.45
#   four-full  4      the same, all layers recomputed, four times the micro-batch
#
# Settings are added to every case; CASES="one two" chooses. Without a GPU it is a tiny model, which tries the script.
set -euo pipefail
out=$1
settings=("${@:2}")
here=$(cd "$(dirname "$0")/../.." && pwd)
[ -n "${PYTHON:-}" ] || PYTHON=$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
: >"$out/rows.jsonl"

# measure NAME GPUS options of policy_step.py, --set and settings last
measure() {
    local name=$1 needs=$2
    shift 2
    [ "$gpus" -ge "$needs" ] || return 0
    [ -z "${CASES:-}" ] || [[ " $CASES " == *" $name "* ]] || return 0
    echo "$name: policy_step.py $* ${settings[*]}" >&2
    "$PYTHON" "$here/benchmarks/policy_step.py" --profile "$out/$name" "$@" "${settings[@]}" | tee -a "$out/rows.jsonl"
}

big=(--model Qwen2.5-32B --layout TP4+SP --samples 16 --steps 3)
if [ "$gpus" -eq 0 ]; then
    measure tiny 0 --model tiny --layout TP1 TP2+SP --samples 2 --sequence-tokens 128 --steps 2 --warmup 1 --set seed=0
else
    measure one 1 --model Qwen3-8B --layers 12 --samples 16 --micro-batch-tokens 16384 --set seed=0
    measure two 2 --model Qwen3-8B --layout TP2+SP --samples 32 --micro-batch-tokens 16384 --set seed=0
    measure four 4 "${big[@]}" --micro-batch-tokens 4096 --set policy.logprob_micro_batch_tokens=8192 \
        policy.optimizer.moments_dtype=bfloat16
    measure four-full 4 "${big[@]}" --micro-batch-tokens 16384 --set policy.logprob_micro_batch_tokens=16384 \
        policy.optimizer.moments_dtype=bfloat16 policy.recompute=full
fi
"$PYTHON" - "$out" "$0 $*" <<'PY'
import json, sys
from pathlib import Path
from benchmarks.run_table import machine

out, command = Path(sys.argv[1]), sys.argv[2]
rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
(out / "mfu.json").write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")
for row in rows:
    shown = ("model", "layers", "layout", "step_s", "tokens_per_s_per_rank", "mfu", "mfu_6n", "peak_gib")
    print("  ".join(f"{key} {row[key]}" for key in shown if key in row))
sys.exit(0 if rows else "no case ran: CASES names none that this host has the GPUs for")
PY
