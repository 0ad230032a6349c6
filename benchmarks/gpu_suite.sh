#!/usr/bin/env bash
# Builds, tests and measures cptool on one CUDA device, offline, with what a machine has that runs
# PyTorch and has nvcc: pybind11, CMake and Ninja for the build, pytest for the tests.
#
#   benchmarks/gpu_suite.sh [--device cuda|cpu] [--out DIR] [CALL | PART...]
#
# Calls: first (build smoke tests), second (attention decode merge ring), third (model emulate
# sanitizer). Each ends within 10 minutes, for machines that are lent for so long: a part gets its
# share of the time that is left, and is stopped then. Parts can be named instead, and share one
# call's time; without any, all calls run one after another. `build` compiles nothing if the
# extension is there, with a watchdog or without as CPTOOL_WATCHDOG asks.
#
# Results are JSON files in DIR (default gpu-results), with the device, its driver, the commit and
# the command, beside a log; DIR.tgz holds all of them. Exits with 1 if a part failed, after the
# others have run. `--device cpu` runs the script itself on tiny sizes.
#
# Environment: CPTOOL_CALL_SECONDS (570), CPTOOL_COMMIT, PYTHON, and what the build reads, such as
# CPTOOL_CUDA_ARCHS=90a (half the time) and CPTOOL_WATCHDOG=1 (a hang becomes an error).
set -uo pipefail
cd "$(dirname "$0")/.."

parts=() device=cuda out=gpu-results
first="build smoke tests" second="attention decode merge ring" third="model emulate sanitizer"
known="$first $second $third"
declare -A weight=([build]=4 [smoke]=1 [tests]=5 [attention]=3 [decode]=2 [merge]=1 [ring]=2
  [model]=3 [emulate]=3 [sanitizer]=4)
while (($#)); do
  case $1 in
    --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    first | second | third) read -ra named <<<"${!1}"; parts+=("${named[@]}"); shift ;;
    *)
      [[ " $known " == *" $1 "* ]] || { echo "gpu_suite.sh: $1 is not a part; parts: $known" >&2; exit 2; }
      parts+=("$1"); shift ;;
  esac
done
[[ $device == cuda || $device == cpu ]] || { echo "gpu_suite.sh: --device $device: cuda or cpu" >&2; exit 2; }

python=${PYTHON:-python3}
call=${CPTOOL_CALL_SECONDS:-570}
CPTOOL_COMMIT=${CPTOOL_COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}
export CPTOOL_COMMIT PYTHONUNBUFFERED=1
mkdir -p "$out"
out=$(cd "$out" && pwd)
day=$(date -u +%F)
name() { echo "$out/gpu_$1-$device-$day.json"; }

has() { "$python" -c "import $1" 2>/dev/null; }

built() {
  "$python" -c "
import sys
from cptool.ops.kernels import build_info
print('built:', build_info())
sys.exit('$device' == 'cuda' and not build_info()['cuda_archs']
         or build_info()['watchdog'] != ('${CPTOOL_WATCHDOG:-}' == '1'))" 2>/dev/null
}

build() {
  ! built || return 0
  local missing=() module
  for module in torch numpy pybind11 setuptools; do has "$module" || missing+=("$module"); done
  for tool in cmake ninja; do command -v "$tool" >/dev/null || missing+=("$tool (on PATH)"); done
  [[ $device == cpu ]] || command -v nvcc >/dev/null || [[ -x ${CUDACXX:-} ]] || missing+=("nvcc (on PATH)")
  "$python" -c "import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))" || missing+=(Python.h)
  if ((${#missing[@]})); then
    (IFS=,; echo "the build needs ${missing[*]}, which this machine lacks")
    return 1
  fi
  for module in click rich safetensors tokenizers gguf jinja2 huggingface_hub pytest hypothesis transformers; do
    has "$module" || echo "without $module: what needs it is left out"
  done
  local cuda=on
  [[ $device == cpu ]] && cuda=off
  CPTOOL_CUDA=$cuda CPTOOL_WERROR=${CPTOOL_WERROR:-0} "$python" setup.py -q build_ext --inplace && built
}

# Each kernel in a process of its own, the fastest last.
smoke() {
  local kernel kernels=(cpu) status=0
  [[ $device == cpu ]] || kernels=(simt sm80 sm90)
  for kernel in "${kernels[@]}"; do
    local program=(-m cptool.exactness.selftest "$device" "$kernel")
    [[ $device == cpu ]] && program=(-m cptool.exactness.selftest cpu portable)
    if CUDA_LAUNCH_BLOCKING=1 timeout 60 "$python" "${program[@]}" >"$out/gpu_smoke-$kernel-$day.jsonl"; then
      echo "$kernel: $(wc -l <"$out/gpu_smoke-$kernel-$day.jsonl") checks passed"
    else
      echo "$kernel: exit code $? (124: no end in 60 s)"
      status=1
    fi
  done
  return $status
}

# A report for each kernel, and one for what is of none.
tests() {
  has pytest || { echo "pytest is missing: smoke has tested the kernels"; return; }
  local kernel status=0 began=$SECONDS left=4 files=(tests/cuda) groups=(simt sm80 sm90 others)
  [[ $device == cpu ]] && files=(tests/cuda/test_gpu_engine.py) groups=(others) left=1
  for kernel in "${groups[@]}"; do
    local words=$kernel share=$(((limit - (SECONDS - began)) / left - 5))
    [[ $kernel == others ]] && words="not simt and not sm80 and not sm90"
    [[ $device == cpu ]] && words="new_values or to_the_host or exposure"
    CPTOOL_GPU_TESTS_ON=$device "$python" benchmarks/gpu_tests.py --device "$device" -k "$words" \
      --limit "$share" --json "$(name "tests-$kernel")" "${files[@]}" || status=1
    left=$((left - 1))
  done
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
      >"$out/emulate.tmp" && "$python" benchmarks/gpu_wrap.py "$out/emulate.tmp" \
      "$(name "emulate-$label")" --device "$device" || status=1
  done
  rm -f "$out/emulate.tmp"
  return $status
}

# Of our kernels alone: torch's own are not ours to judge, and torch probes the driver with calls
# that may fail. Without a GPU the programs run as they are.
sanitized() {
  local tool=$1 seconds=$2
  shift 2
  local under=(compute-sanitizer --tool "$tool" --kernel-name kernel_substring=cptool --report-api-errors no
    --error-exitcode 9 --print-limit 20)
  [[ $device == cpu ]] && under=()
  PYTHONPATH=$PWD timeout "$seconds" "${under[@]}" "$python" "$@"
}

# What is most likely to find something first, and with most of the time: a tool takes half a minute
# to import torch, and makes a kernel tens of times slower.
sanitizer() {
  [[ $device == cpu ]] || command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing"; return 1; }
  local line tool kernel share verdict status=0 entries=() began=$SECONDS total=0 log="$out/gpu_sanitizer.log"
  local runs=("memcheck sm90 5" "racecheck sm90 5" "memcheck sm80 2" "racecheck sm80 2" "synccheck sm90 2"
    "memcheck simt 2" "memcheck token-wise 1" "synccheck sm80 1" "initcheck sm90 1")
  [[ $device == cpu ]] && runs=("memcheck portable 1")
  for line in "${runs[@]}"; do total=$((total + ${line##* })); done
  : >"$log"
  for line in "${runs[@]}"; do
    read -r tool kernel share <<<"$line"
    local program=(tests/cuda/sanitizer_matrix.py --device "$device" "$kernel")
    [[ $kernel == token-wise ]] && program=(-m cptool.exactness.selftest cuda simt)
    sanitized "$tool" $(((limit - 10 - (SECONDS - began)) * share / total)) "${program[@]}" >>"$log" 2>&1
    case $? in
      0) verdict=clean ;;
      9) verdict=errors; status=1 ;;
      124) verdict="no end in time"; status=1 ;;
      *) verdict="wrong results, or it did not run"; status=1 ;;
    esac
    total=$((total - share))
    echo "$tool $kernel: $verdict"
    entries+=("{\"tool\": \"$tool\", \"kernel\": \"$kernel\", \"verdict\": \"$verdict\"}")
    (IFS=,; echo "[${entries[*]}]") >"$out/gpu_sanitizer.json"
  done
  ((status == 0)) || grep -E "^=========|Error" "$log" | head -60
  "$python" benchmarks/gpu_wrap.py "$out/gpu_sanitizer.json" "$(name sanitizer)" --device "$device" &&
    rm -f "$out/gpu_sanitizer.json"
  return $status
}

# Runs parts within the time of one call. A part runs in a shell of its own, so that `timeout` can
# end it with all that it started.
export -f built build smoke tests measured attention decode merge ring model emulate sanitized sanitizer has name
export python device out day limit
failed=()
run_call() {
  local part began=$SECONDS total=0
  for part in "$@"; do total=$((total + ${weight[$part]})); done
  for part in "$@"; do
    limit=$(((call - (SECONDS - began)) * ${weight[$part]} / total))
    total=$((total - ${weight[$part]}))
    local since=$SECONDS
    echo "== $part (at most $limit s)"
    timeout --kill-after=5 "$limit" bash -uo pipefail -c "$part" 2>&1 | tee -a "$out/gpu_suite.log" || failed+=("$part")
    echo "== $part: $((SECONDS - since)) s"
  done
}
if ((${#parts[@]})); then
  run_call "${parts[@]}"
else
  for parts in "$first" "$second" "$third"; do
    # shellcheck disable=SC2086
    run_call $parts
  done
fi
tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all results: $out.tgz"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
