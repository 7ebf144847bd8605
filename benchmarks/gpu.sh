#!/usr/bin/env bash
# Measures scalora on one GPU of 16 GB or more, in ten minutes at most:
#   tests   pytest -m gpu: agreement with the CPU, resuming, GradScaler, compiling, nothing that waits for the device
#   steps   time and peak memory of steps beside LoRA, DoRA and full training on a Llama of 1.2 billion random weights,
#           a rescale by its parts, kernels launched (gpu/steps.py)
#   cities  what MiniLM learns, over methods, rates, seeds and batch sizes, many runs at once (gpu/cities.py)
#
#   python -m gpu.carry MODEL FOLDER runs/cities    # once, with benchmarks and src in PYTHONPATH: the data for cities
#   benchmarks/gpu.sh --output runs/gpu --carried FOLDER
#
# It needs torch >= 2.11, triton, transformers, peft and jaxtyping, and pytest for the tests; no network, and scalora
# need not be installed. The results are gpu.json and gpu.md; those of each part are written as they come, and a part
# ends when its time is over. Without a GPU, or with --toy, everything runs at toy size.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: gpu.sh --output FOLDER [--carried FOLDER] [--minutes 10] [--parts tests,steps,cities] [--studies FILE]...
              [--workers N] [--only METHODS] [--toy] [--mps]
  --carried  what gpu.carry wrote; without it there is no part cities, except at toy size
  --minutes  for all parts: three tenths for the tests at most, then half of the rest for steps, and the rest for cities
  --studies  what the part cities trains; by default gpu/cities.json; may be given more than
             once. Others: gpu/facts.json, gpu/target.json
  --workers  runs of the part cities at once; by default by cores and memory
  --only     methods of the part steps, with ';' between them
  --mps      starts NVIDIA's multi-process service for the part cities, with which kernels of several runs overlap
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
output='' carried='' minutes=10 parts=tests,steps,cities studies=() workers='' only='' toy='' mps=''
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=$2; shift 2 ;;
    --carried) carried=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --parts) parts=$2; shift 2 ;;
    --studies) studies+=("$2"); shift 2 ;;
    --workers) workers=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --toy) toy=yes; shift ;;
    --mps) mps=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
if [ -z "$output" ]; then
  echo "gpu.sh: --output is missing: the folder for the results" >&2
  exit 2
fi
mkdir -p "$output"

export PYTHONPATH=$root/src:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python=${PYTHON:-python3}
if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no GPU: toy size"
  toy=yes
fi

start=$SECONDS
budget=$("$python" -c "print(int(60 * $minutes))")
left() { echo $((budget - (SECONDS - start))); }
has() { [[ ,$parts, == *,$1,* ]]; }
as_minutes() { "$python" -c "print(max(1, $1) / 60)"; }
# Ends a part that does not end itself.
limited() { timeout --kill-after=10 "$@"; }

status=0
if has tests; then
  parallel=''
  if "$python" -c 'import xdist' 2>/dev/null && [ -z "$toy" ]; then parallel="-n $(($(nproc) > 8 ? 8 : $(nproc)))"; fi
  # shellcheck disable=SC2086 # two words
  limited $((budget * 3 / 10 > 30 ? budget * 3 / 10 : 30)) "$python" -m pytest -o addopts= -q -rfE --tb=short -p no:cacheprovider \
    --rootdir "$root" -c "$root/pyproject.toml" $parallel -m gpu "$root"/tests/test_gpu{,_merges,_factored}.py 2>&1 |
    tee "$output/tests.log"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then status=1; fi
fi

if has steps; then
  seconds=$(left)
  if has cities && [ -n "$carried$toy" ]; then seconds=$((seconds / 2)); fi
  limited $((seconds + 20)) "$python" -m gpu.steps --output "$output" --minutes "$(as_minutes $seconds)" \
    ${toy:+--toy --rounds 1} ${only:+--only "$only"} || status=1
fi

if has cities && [ -z "$carried$toy" ]; then
  echo "gpu.sh: no part cities without --carried"
elif has cities; then
  if [ -n "$mps" ]; then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) && CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    trap 'echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1' EXIT
    if ! timeout 20 nvidia-cuda-mps-control -d || ! timeout 60 "$python" -c 'import torch; torch.ones(1).cuda().item()'
    then
      echo "gpu.sh: no multi-process service: without it"
      echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1
      unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
  fi
  if [ -n "$toy" ]; then
    what=(--model toy --device cpu) default=toy
  else
    what=(--model "$carried/model" --data "$carried") default=cities
  fi
  if [ ${#studies[@]} -eq 0 ]; then studies=("$root/benchmarks/gpu/$default.json"); fi
  what+=(--studies "${studies[@]}")
  seconds=$(left)
  limited $((seconds + 20)) "$python" -m gpu.cities "${what[@]}" --output "$output" \
    --minutes "$(as_minutes "$seconds")" ${workers:+--workers "$workers"} || status=1
fi

"$python" -m gpu.report "$output" || status=1
echo "gpu.sh: $((SECONDS - start)) s; $output/gpu.md"
exit $status
