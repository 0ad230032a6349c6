#!/usr/bin/env bash
# Builds, tests and measures cptool on one CUDA device, offline, with what a machine has that runs
# PyTorch and has nvcc: pybind11, CMake and Ninja for the build, pytest for the tests.
#
#   benchmarks/gpu_suite.sh [--device cuda|cpu] [--out DIR] [PART...]
#
# Parts: build tests sanitizer attention decode merge ring model emulate; without any, all of them
# in this order. Each ends within 9 minutes or is stopped. Results are JSON files in DIR (default
# benchmarks/results), with the device, its driver, the commit and the command. Exits with 1 if a
# part failed, after the others have run. `--device cpu` runs the script itself on tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=() device=cuda out=benchmarks/results
known="build tests sanitizer attention decode merge ring model emulate"
while (($#)); do
  case $1 in
    --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *)
      [[ " $known " == *" $1 "* ]] || { echo "gpu_suite.sh: $1 is not a part; parts: $known" >&2; exit 2; }
      parts+=("$1"); shift ;;
  esac
done
((${#parts[@]})) || read -ra parts <<<"$known"
[[ $device == cuda || $device == cpu ]] || { echo "gpu_suite.sh: --device $device: cuda or cpu" >&2; exit 2; }

python=${PYTHON:-python3}
limit=${CPTOOL_PART_SECONDS:-540}
CPTOOL_COMMIT=${CPTOOL_COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}
export CPTOOL_COMMIT PYTHONUNBUFFERED=1
mkdir -p "$out"
day=$(date -u +%F)
name() { echo "$out/gpu_$1-$device-$day.json"; }

has() { "$python" -c "import $1" 2>/dev/null; }

build() {
  local missing=() module
  for module in torch numpy pybind11 setuptools; do has "$module" || missing+=("$module"); done
  for tool in cmake ninja; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [[ $device == cpu ]] || command -v nvcc >/dev/null || [[ -x ${CUDACXX:-} ]] || missing+=(nvcc)
  if ((${#missing[@]})); then
    echo "the build needs ${missing[*]}, which this machine lacks"
    return 1
  fi
  for module in click rich safetensors tokenizers gguf jinja2 huggingface_hub pytest hypothesis transformers; do
    has "$module" || echo "without $module: what needs it is left out"
  done
  local cuda=on
  [[ $device == cpu ]] && cuda=off
  CPTOOL_CUDA=$cuda CPTOOL_WERROR=${CPTOOL_WERROR:-0} "$python" setup.py -q build_ext --inplace &&
    "$python" -c "
import cptool.engine.engine
from cptool.ops.kernels import build_info
print('built:', build_info())"
}

tests() {
  local report="$out/gpu_tests-$device-$day.xml"
  if ! has pytest; then
    echo "pytest is missing: the kernels' self-test runs instead of the test suite"
    "$python" -m cptool.exactness.selftest "$device" | tee "$out/gpu_selftest-$device-$day.jsonl"
    return
  fi
  local files=(tests/cuda)
  [[ $device == cpu ]] && files=(tests/cuda/test_gpu_engine.py) # which runs there, too
  # Modules whose own needs are missing here are reported and do not keep the others from running.
  CPTOOL_GPU_TESTS_ON=$device "$python" -m pytest -q -m gpu -p no:cacheprovider \
    --continue-on-collection-errors --junitxml="$report" "${files[@]}"
  local status=$?
  "$python" benchmarks/gpu_tests_report.py "$report" "$(name tests)" --device "$device" && rm -f "$report"
  return $status
}

sanitizer() {
  if [[ $device == cpu ]]; then
    "$python" -m cptool.exactness.selftest cpu
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing"; return 1; }
  local tool kernel verdict status=0 entries=() kernels log="$out/gpu_sanitizer.log"
  read -ra kernels <<<"$("$python" -c "from cptool.ops.kernels import cuda_kernels; print(*cuda_kernels())")"
  : >"$log"
  for tool in memcheck racecheck synccheck initcheck; do
    for kernel in "${kernels[@]}" token-wise; do
      local program=(tests/cuda/sanitizer_matrix.py "$kernel")
      [[ $kernel == token-wise ]] && program=(-m cptool.exactness.selftest cuda simt)
      # Of our kernels alone: torch's own are not ours to judge.
      PYTHONPATH=$PWD timeout $((limit / 4 / (${#kernels[@]} + 1))) compute-sanitizer --tool $tool \
        --kernel-name kernel_substring=cptool --error-exitcode 9 --print-limit 20 \
        "$python" "${program[@]}" >>"$log" 2>&1
      case $? in
        0) verdict=clean ;;
        9) verdict=errors; status=1 ;;
        124) verdict="no end in time"; status=1 ;;
        *) verdict="wrong results, or it did not run"; status=1 ;;
      esac
      echo "$tool $kernel: $verdict"
      entries+=("{\"tool\": \"$tool\", \"kernel\": \"$kernel\", \"verdict\": \"$verdict\"}")
    done
  done
  ((status == 0)) || grep -E "^=========|Error" "$log" | head -60
  (IFS=,; echo "[${entries[*]}]") >"$out/sanitizer.tmp"
  "$python" benchmarks/gpu_tests_report.py --wrap "$out/sanitizer.tmp" "$(name sanitizer)" --device "$device"
  rm -f "$out/sanitizer.tmp"
  return $status
}

measured() { "$python" benchmarks/gpu_attention.py "$1" --device "$device" --json "$(name "$1")"; }
attention() { measured attention; }
decode() { measured decode; }
merge() { measured merge; }
ring() { measured ring; }
model() { "$python" benchmarks/gpu_model.py --device "$device" --json "$(name model)"; }

emulate() {
  local status=0 label options line
  local cases=("405b-1m --shape llama3-405b --cp 16 --tp 8 --context 1M"
    "405b-1m-fp8 --shape llama3-405b --cp 16 --tp 8 --context 1M --fp8"
    "405b-128k --shape llama3-405b --cp 4 --tp 8 --context 128K"
    "405b-128k-fp8 --shape llama3-405b --cp 4 --tp 8 --context 128K --fp8"
    "8b-128k --shape llama3-8b --cp 8 --tp 1 --context 128K")
  [[ $device == cpu ]] && cases=("1b-256 --shape llama3-1b --cp 4 --tp 2 --context 256 --repeats 1")
  for line in "${cases[@]}"; do
    read -r label options <<<"$line"
    # shellcheck disable=SC2086
    "$python" -m cptool bench emulate $options --device "$device" --hardware gtt-h100 --json \
      >"$out/emulate.tmp" && "$python" benchmarks/gpu_tests_report.py --wrap "$out/emulate.tmp" \
      "$(name "emulate-$label")" --device "$device" || status=1
  done
  rm -f "$out/emulate.tmp"
  return $status
}

# A part runs in a shell of its own, so that `timeout` can end it with all that it started.
export -f build tests sanitizer measured attention decode merge ring model emulate has name
export python device out day limit
failed=()
for part in "${parts[@]}"; do
  echo "== $part"
  began=$SECONDS
  timeout --kill-after=10 "$limit" bash -uo pipefail -c "$part" || failed+=("$part")
  echo "== $part: $((SECONDS - began)) s"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
