#!/usr/bin/env bash
# Everything that has a CUDA path, in one call on a machine with a GPU: build, correctness, benchmarks, a short real run.
#
#   bash tools/bench/gpu_all.sh OUT            PYTHON=... chooses the interpreter (default: .venv/bin/python or python3)
#
# Writes logs and JSON below OUT; a step that fails is reported at the end and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: bash tools/bench/gpu_all.sh OUT}
mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

step() {
  local name=$1
  shift
  echo "== $name ($SECONDS s)"
  "$@" > "$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 4 "$out/$name.log"
}

step environment bash -c "nvidia-smi; $python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'"
step build "$python" -m shodh.ops --build cuda
step ops "$python" -m shodh.ops
step gpu_tests "$python" -m pytest -q -m gpu tests -p no:cacheprovider
for dtype in float32 bfloat16; do
  step "decode_$dtype" "$python" tools/bench/decode.py --device cuda --batch 8 --dtype "$dtype" --json "$out/decode_$dtype.json"
done
step step_small "$python" tools/bench/step.py --config launch/configs/h100_single.yaml --batch 2 --out "$out/step.json"

# The real job at full resolution, shortened: 128^3 fields, 16^3 latents, the single-card configuration.
step data "$python" tools/generate_data.py --regime open_channel porous_media --grid 128 --trajectories 6 --frames 8 \
  --trajectories-per-file 2 --out "$out/data" --device cuda --set open_channel.spin_up=0.5
short=(--config launch/configs/h100_single.yaml --set "out=$out/runs" name=h100 data.workers=4
  "data.regimes.0.path=$out/data/open_channel" "data.regimes.1.path=$out/data/porous_media"
  tokenizer.train.steps=100 tokenizer.train.log_every=10 operator.train.steps=200 operator.train.log_every=10
  tokenizer.train.checkpoint_every=0 operator.train.checkpoint_every=0)
step tokenizer "$python" launch/train_tokenizer.py "${short[@]}"
step pretrain "$python" launch/pretrain.py "${short[@]}"
step evaluate "$python" launch/evaluate.py --run "$out/runs/h100"
cp "$out"/runs/h100/metrics.jsonl "$out/pretrain_metrics.jsonl" 2> /dev/null

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
