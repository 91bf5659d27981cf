#!/usr/bin/env bash
# Everything that proves fused_rnn on a machine with an NVIDIA GPU, within ten minutes: build for the GPU that is
# there, microbenchmarks, the whole GPU test suite, compute-sanitizer on small cases, benchmark, tables and plots. To $OUT
# (default benchmarks/results) go gpu.log, micro.jsonl, DEVICE.jsonl, tables.md and the plots.
# A stage that fails or runs out of its time does not stop the later ones, except the build; the benchmark gets the time that
# the others left. The last line says what failed, and so does the exit status.
# Needs python3 with torch (CUDA), pytest and hypothesis, nvcc, compute-sanitizer for its stages, matplotlib for the plots.
# pytest-xdist runs the tests in 8 processes; without it the first kernel that ends the CUDA context, or hangs, ends the tests.
#   TOTAL=570 benchmarks/gpu.sh                   # seconds for everything
#   STAGES="build tests" benchmarks/gpu.sh        # of: build micro tests memcheck racecheck bench plots
#   DEVICE=cpu TOTAL=300 benchmarks/gpu.sh        # rehearsal without a GPU: micro only compiles, CPU tests, CPU benchmark
set -u -o pipefail
cd "$(dirname "$0")/.."
out=${OUT:-$PWD/benchmarks/results}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=${TOTAL:-570}
stages=${STAGES:-build micro tests memcheck racecheck bench plots}
mkdir -p "$out"
log=$out/gpu.log
: >"$log"
jobs=$(nproc)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD MAX_JOBS=${MAX_JOBS:-$jobs}
unset FUSED_RNN_PLAN FUSED_RNN_BACKEND
failed=()

left() { echo $((total - SECONDS)); }

stage() { # name, most seconds, command...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "$name: no time left"
    failed+=("$name")
    return 1
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 && status=0 || status=$?
  if [ "$status" = 0 ]; then
    echo "$name: ok, $((SECONDS - start)) s"
    return 0
  fi
  echo "$name: FAILED with status $status$([ "$status" = 124 ] && echo " (out of time)"), $((SECONDS - start)) s; the end of $log:"
  tail -n 25 "$log"
  failed+=("$name")
  return 1
}

has_module() { "$python" -c "import $1" 2>/dev/null; }

# tool, pytest's -k: only our kernels are watched. A sanitizer that does not come to start its program may still exit with 0:
# a test must have passed.
sanitizer() {
  local options=(--tool "$1" --kernel-name kns=fused_rnn --error-exitcode 9) tests
  [ "$device" = cpu ] && options+=(--require-cuda-init no)
  if [ "$1" = racecheck ]; then
    # The barriers of a block lie in dynamic shared memory, where the compiler does not count them.
    options+=(--num-cuda-barriers 64)
    # The tool takes a push for one to a block that may have ended unless a barrier of the whole cluster follows. Here the block
    # awaits every push to it before it ends, which the simulator checks: that warning is off.
    export NV_COMPUTE_SANITIZER_MAX_RACECHECK_CLUSTER_RECORDS=0
  fi
  tests=$(mktemp)
  compute-sanitizer "${options[@]}" "$python" -m pytest -v -x -p no:cacheprovider "$test_file" -k "$2" | tee "$tests"
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] && ! grep -qE '^=+ .*[0-9]+ passed' "$tests" && status=1
  rm -f "$tests"
  return "$status"
}
export -f sanitizer
export python device

if [ "$device" = cpu ]; then
  export FUSED_RNN_CUDA=0
  micro=(--build-only --arch sm_90a)
  tests=(tests/test_layers.py tests/test_families.py -k "cpu or families")
  export test_file=tests/test_layers.py small="cpu and T5-B3-I4-H6-float16 and LSTM"
else
  export FUSED_RNN_CUDA=1
  micro=(--output "$out/micro.jsonl")
  # test_micro.py is the stage before.
  tests=(tests -m gpu --ignore=tests/simt --ignore=tests/test_micro.py)
  has_module xdist && tests+=(-n $((jobs < 8 ? jobs : 8)))
  # Three cells and every persistent family: variable lengths, resets, two directions are in other tests.
  export test_file=tests/test_families.py small="test_against_fp64 and H33 and lengths and resets-float16"
fi

rm -f "$out/micro.jsonl" "$out/$device.jsonl"
if ! stage build 180 "$python" setup.py build_ext --inplace; then
  echo "failed: build; nothing else was run"
  exit 1
fi
"$python" -m fused_rnn info | tee -a "$log"
stage micro 70 "$python" benchmarks/micro/run.py "${micro[@]}"
# -v: what was decided is in the log also if the stage's time runs out. A test of 60 s is ended, with its process.
stage tests 150 env FUSED_RNN_TEST_LIMIT=60 "$python" -m pytest -v -p no:cacheprovider --durations=10 "${tests[@]}"
grep -E '^[0-9]+ passed|^=+ .*(passed|failed)' "$log" | tail -n 1
stage memcheck 50 bash -c 'sanitizer memcheck "$small"'
stage racecheck 50 bash -c 'sanitizer racecheck "$small and not RNN"'
budget=$(($(left) - 40))
[ "$budget" -lt 10 ] && budget=10
stage bench $((budget + 25)) "$python" benchmarks/run.py --device "$device" --plan cheapest --budget "$budget" --output "$out/$device.jsonl"
grep -E 'geometric mean|^not measured' "$log"
draw=()
has_module matplotlib && draw=(--plots "$out")
if [ -s "$out/$device.jsonl" ]; then
  stage plots 30 bash -c '"$0" benchmarks/compare.py "${@:2}" | tee "$1"' "$python" "$out/tables.md" "$out/$device.jsonl" "${draw[@]}"
fi
echo "$SECONDS s; results in $out: $(ls "$out" | tr '\n' ' ')"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed"
