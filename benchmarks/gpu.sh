#!/usr/bin/env bash
# Everything that proves fused_rnn on a machine with an NVIDIA GPU, in under ten minutes on 16 cores: build for the GPU that is
# there, GPU tests, compute-sanitizer on small cases, benchmark. Writes logs and results to $OUT (default benchmarks/results).
# A stage that fails or runs out of its time does not stop the later ones; the last line says what failed, and so does the exit
# status. Needs python3 with torch (CUDA), pytest, hypothesis and expecttest, nvcc, and compute-sanitizer for its stage.
#   SECONDS_PER_CASE=0.6 benchmarks/gpu.sh
#   STAGES="build tests" benchmarks/gpu.sh
set -u -o pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-$root/benchmarks/results}
python=${PYTHON:-python3}
device=${DEVICE:-cuda} # cpu rehearses the script without a GPU
mkdir -p "$out"
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONPATH=$root
failed=()

stage() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  case " ${STAGES:-build tests memcheck racecheck bench} " in *" $name "*) ;; *) return ;; esac
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "$name: ok, $((SECONDS - start)) s"
  else
    echo "$name: FAILED with status $?, $((SECONDS - start)) s; the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
    failed+=("$name")
  fi
}

# The small cases for the sanitizers, which slow kernels down a hundredfold.
small="$device and T5-B3-I4-H6 and not L2 and not L3"

build() { FUSED_RNN_CUDA=$([ "$device" = cuda ] && echo 1 || echo 0) "$python" setup.py build_ext --inplace; }
export -f build
export python device

stage build 240 bash -c build
"$python" -m fused_rnn info | tee "$out/info.log"
stage tests 150 "$python" -m pytest -q -p no:cacheprovider tests/test_layers.py tests/test_ops.py tests/test_packed.py -k "$device"
stage memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider tests/test_layers.py -k "$small"
stage racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider tests/test_layers.py -k "$small and float32"
stage bench 300 "$python" -m fused_rnn bench --device "$device" --seconds "${SECONDS_PER_CASE:-0.7}" --output "$out/$device.jsonl"
tail -n 12 "$out/bench.log" 2>/dev/null
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed"
