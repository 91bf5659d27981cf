#!/usr/bin/env bash
# The first minutes on a machine with an NVIDIA GPU, as two runs of about five minutes. Each is useful alone; run 2 is
# prepared from what run 1 said. To $OUT (default benchmarks/results/gpu-run1 and -run2) go run.log, about.json and the files
# below.
#   benchmarks/gpu.sh 1   what is there; the torch-free program (benchmarks/torch_free) on it: dependent launches, every
#                         family against float64, small layers and large ones, clusters, cooperative launches, hand-offs;
#                         times of step, block, cluster and grid beside the cost model's (time.jsonl), microbenchmarks
#                         (micro.jsonl), sanitizers; GPU tests of the default families; the bench's 40 cases, as a user's
#                         first calls make them (bench.jsonl)
#   benchmarks/gpu.sh 2   verification of every family (record.txt), tests of all families and of overlapping layers, a
#                         family chosen for each of the 40 cases (tune.txt), the bench with that record (bench.jsonl), tables
#                         and plots
# The extension compiles while the torch-free program runs. That program and the microbenchmarks are built beforehand, on a
# machine with nvcc and without a GPU, and carried in build/torch_free; what is missing is built here:
#   python benchmarks/torch_free/build.py
#   python benchmarks/micro/run.py --build-only --arch sm_90a --programs build/torch_free
# A stage that fails or runs out of its time does not stop the later ones, except a failed build those that need torch. The
# last line says what failed, and so does the exit status.
#   TOTAL=290 benchmarks/gpu.sh 1                  # seconds for everything
#   STAGES="built info tests" benchmarks/gpu.sh 1  # only these
#   REHEARSAL=1 TOTAL=900 benchmarks/gpu.sh 1      # without a GPU: checks on the simulated device, and what can run on a CPU
# Needs python3 with torch (CUDA), pytest, hypothesis, nvcc; compute-sanitizer for its stages, matplotlib for the plots.
# pytest-xdist runs the tests in 8 processes; without it the first kernel that ends the CUDA context ends the tests.
set -u -o pipefail
cd "$(dirname "$0")/.."
run=${1:-}
case $run in 1 | 2) ;; *)
  echo "usage: benchmarks/gpu.sh 1 or benchmarks/gpu.sh 2, got '$run'" >&2
  exit 2
  ;;
esac
out=${OUT:-benchmarks/results/gpu-run$run}
python=${PYTHON:-python3}
programs=${PROGRAMS:-build/torch_free}
total=${TOTAL:-290}
rehearsal=${REHEARSAL:-}
stages=${STAGES:-}
mkdir -p "$out"
case $out in /*) absolute=$out ;; *) absolute=$PWD/$out ;; esac
log=$out/run.log
: >"$log"
jobs=$(nproc)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD MAX_JOBS=${MAX_JOBS:-$((jobs > 3 ? jobs - 2 : jobs))} FUSED_RNN_CUDA=1
unset FUSED_RNN_PLAN FUSED_RNN_BACKEND FUSED_RNN_TUNE
device=cuda
if [ -n "$rehearsal" ]; then
  device=cpu
  export FUSED_RNN_CUDA=0
fi
failed=()

left() { echo $((total - SECONDS)); }
say() { echo "[$SECONDS s] $*" | tee -a "$log"; }
has_module() { "$python" -c "import $1" 2>/dev/null; }

stage() { # name, most seconds, command...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  case " ${stages:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 3 ]; then
    say "$name: no time left"
    failed+=("$name")
    return 1
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=3 "$limit" "$@" >"$out/stage.log" 2>&1 && status=0 || status=$?
  cat "$out/stage.log" >>"$log"
  if [ "$status" = 0 ]; then
    say "$name: ok, $((SECONDS - start)) s"
    return 0
  fi
  if [ -n "$rehearsal" ] && [ "$status" = 77 ]; then
    say "$name: not rehearsed, it needs a GPU"
    return 0
  fi
  say "$name: FAILED with status $status$([ "$status" = 124 ] && echo " (out of time)"), $((SECONDS - start)) s; its end:"
  tail -n 12 "$out/stage.log"
  failed+=("$name")
  return 1
}

# Without a GPU a command must end with these words, and not with 0.
needs_gpu() { # words, command...
  local words=$1 text
  shift
  [ -n "$rehearsal" ] || exec "$@"
  if text=$("$@" 2>&1); then
    echo "$text"
    echo "expected: $words"
    return 1
  fi
  echo "$text"
  grep -q "$words" <<<"$text"
}

hardware() {
  nvidia-smi -L
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,mig.mode.current --format=csv,noheader
  local tool
  for tool in git nvcc ninja g++ compute-sanitizer cuobjdump; do
    command -v "$tool" >/dev/null && echo "$tool: there" || echo "$tool: missing"
  done
  echo "$(nproc) processors"
  [ -n "$rehearsal" ] || nvidia-smi -L >/dev/null
}

# Our kernels alone are watched. A sanitizer that does not come to start its program may still exit with 0: a case must have
# been right.
sanitizer() { # tool, family
  local options=(--tool "$1" --kernel-name kns=fused_rnn --error-exitcode 9) status
  if [ "$1" = racecheck ]; then
    # The barriers of a block lie in dynamic shared memory, where the compiler does not count them.
    options+=(--num-cuda-barriers 64)
    # The tool takes a push for one to a block that may have ended unless a barrier of the whole cluster follows. Here the
    # block awaits every push to it before it ends, which the simulator checks: that warning is off.
    export NV_COMPUTE_SANITIZER_MAX_RACECHECK_CLUSTER_RECORDS=0
  fi
  compute-sanitizer "${options[@]}" "$programs/first" check "$2" small 0 | tee "$out/sanitizer.txt"
  status=${PIPESTATUS[0]}
  grep -q '^ok ' "$out/sanitizer.txt" || status=1
  rm -f "$out/sanitizer.txt"
  return "$status"
}

first() { # arguments of the torch-free program
  [ -z "$rehearsal" ] || [ -x "$programs/first" ] || exit 77
  needs_gpu "ERROR" "$programs/first" "$@"
}

micro() { # names
  [ -z "$rehearsal" ] || exit 77
  exec "$python" benchmarks/micro/run.py --programs "$programs" --output "$out/micro.jsonl" "$@"
}

about() { # device, date, commit, versions of driver, torch, CUDA and cuDNN
  local code="import json; from fused_rnn.bench import machine; print(json.dumps(machine('$device')))"
  "$python" -c "$code" | tee "$out/about.json"
}

export -f needs_gpu hardware sanitizer first micro about
export python programs out rehearsal device

tests() { # most seconds, files...
  local limit=$1 options=(-q -p no:cacheprovider --durations=5)
  shift
  has_module xdist && options+=(-n $((jobs < 8 ? jobs : 8)))
  [ -n "$rehearsal" ] || options+=(-m gpu)
  # A test of 30 s is ended, with its process.
  stage tests "$limit" env FUSED_RNN_TEST_LIMIT=30 "$python" -m pytest "${options[@]}" "$@"
  grep -hE '[0-9]+ (passed|failed)' "$out/stage.log" | tail -n 1
}

bench() { # most seconds, options...
  local limit=$1
  shift
  [ "$limit" -gt "$(($(left) - 15))" ] && limit=$(($(left) - 15))
  rm -f "$out/bench.jsonl"
  local command=("$python" benchmarks/run.py --device "$device" --preset first --budget "$limit")
  stage bench $((limit + 15)) "${command[@]}" --output "$out/bench.jsonl" "$@"
  grep -hE 'geometric mean|^not measured' "$out/stage.log"
}

finish() {
  rm -f "$out/stage.log"
  say "results in $out: $(ls "$out" | tr '\n' ' ')"
  if [ ${#failed[@]} -gt 0 ]; then
    say "failed: ${failed[*]}"
    exit 1
  fi
  say "all stages passed"
  exit 0
}

little=(--hidden 64 --mode inference --baseline torch.nn --no-memory)  # of a rehearsal

# setup.py names the .cu files first: the longest of them decide when the build ends.
build_log=$out/build.log
build=("$python" setup.py build_ext --inplace)

run_1() {
  rm -f "$out/time.jsonl" "$out/micro.jsonl"
  stage hardware 15 bash -c hardware
  if [ -z "$rehearsal" ] && [ ! -x "$programs/first" ]; then
    say "$programs/first is not there: it is built before the extension"
    stage program 200 "$python" benchmarks/torch_free/build.py --output "$programs/first" --arch "${ARCH:-sm_90a}"
  fi
  setsid "${build[@]}" >"$build_log" 2>&1 &
  local builder=$! family
  trap "kill -- -$builder 2>/dev/null" EXIT
  stage pdl 20 bash -c 'first pdl'
  for family in single step block cluster grid gemm; do
    if [ -n "$rehearsal" ]; then # on the simulated device
      stage "check-$family" 300 "$python" -m pytest -q -p no:cacheprovider tests/simt/test_torch_free.py -k "$family"
    else
      stage "check-$family" 25 bash -c "first check $family small"
    fi
  done
  stage clusters 20 bash -c 'micro clusters push handoff'
  for family in cluster grid step; do
    stage "check-$family-large" 40 bash -c "first check $family large 3"
  done
  stage coop 20 bash -c 'first coop'
  stage meet 25 bash -c 'first meet'
  stage built "$(($(left) > 120 ? $(left) - 100 : 20))" tail --pid="$builder" -f /dev/null || kill -- "-$builder"
  wait "$builder" || {
    say "build: FAILED; the end of $build_log:"
    tail -n 12 "$build_log"
    failed+=(build)
  }
  stage constants 30 bash -c 'micro launch memory mma'
  for family in step block cluster grid; do
    stage "time-$family" 25 bash -c "first time $family"
    grep '^{' "$out/stage.log" >>"$out/time.jsonl"
  done
  if [ -z "$rehearsal" ]; then
    stage memcheck 25 bash -c 'sanitizer memcheck cluster && sanitizer memcheck grid && sanitizer memcheck step && sanitizer memcheck block'
    stage racecheck 25 bash -c 'sanitizer racecheck cluster'
  fi
  case " ${failed[*]-} " in *" build "*) finish ;; esac
  stage info 20 "$python" -m fused_rnn info
  stage about 20 bash -c about
  if [ -n "$rehearsal" ]; then
    tests 200 tests/test_kinds.py
    bench 20 "${little[@]}"
  else
    tests 60 tests/test_layers.py tests/test_cells.py tests/test_cuda_graphs.py
    bench 45 --baseline torch.nn
  fi
}

run_2() {
  export FUSED_RNN_TUNE_FILE=$absolute/record.txt
  rm -f "$FUSED_RNN_TUNE_FILE"
  stage hardware 15 bash -c hardware
  if ! stage build 170 "${build[@]}"; then finish; fi
  stage info 20 "$python" -m fused_rnn info
  stage about 20 bash -c about
  stage verify 90 bash -c 'needs_gpu "verify: needs a GPU" "$python" -m fused_rnn verify'
  if [ -n "$rehearsal" ]; then
    tests 200 tests/test_tuning_choice.py
  else
    tests 80 tests/test_families.py tests/test_overlap.py
  fi
  stage tune 70 bash -c 'needs_gpu "tune: --first needs a GPU" "$python" -m fused_rnn tune --first --budget 60'
  case " ${stages:-tune} " in *" tune "*) cp "$out/stage.log" "$out/tune.txt" ;; esac
  stage record 15 "$python" -m fused_rnn tune --list
  if [ -n "$rehearsal" ]; then bench 20 "${little[@]}"; else bench 60 --baseline torch.nn step; fi
  local draw=()
  has_module matplotlib && draw=(--plots "$out")
  if [ -s "$out/bench.jsonl" ]; then
    stage plots 30 bash -c '"$0" benchmarks/compare.py "${@:2}" | tee "$1"' \
      "$python" "$out/tables.md" "$out/bench.jsonl" ${draw[@]+"${draw[@]}"}
  fi
}

{ # read as a whole, before anything runs
  say "run $run${rehearsal:+, rehearsed without a GPU}: $(git rev-parse --short HEAD 2>/dev/null), $(date -u +%Y-%m-%d)"
  "run_$run"
  finish
}
