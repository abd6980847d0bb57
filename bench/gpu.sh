#!/usr/bin/env bash
# Everything that is measured on one GPU, in parts that each end within eight minutes:
#
#     bench/gpu.sh [tests|ops|peers|autotune|long|models|steps|memory|generate|profile|sanitize|all]
#
# tests    the gpu-marked smoke tests, in at most 440 s; the log has each result as it comes
# ops      the headline operations, 139 records of 1.24 s (0.12 s a timing): 172 s beside warming,
#          which has at most half of 400 s. One process; PROCESSES=2, then 3, in later calls adds one
# peers    the same against every way to compute them, torch.compile as it is and plan P1 too: 165
#          records, 205 s beside warming, which has at most half of 430 s; after ops 26, 33 s
# autotune mode max-autotune beside two others at three shapes of 32,768 rows: up to 10 s a product,
#          80 s a shape, not warmed, since choices are timed; in at most 360 s
# long     32,768 rows in few samples, and with their gradients as before decision 57, in 240 s
# models   layers and training steps, in at most 440 s
# steps    a training step of each model family, image features cached and computed, in 150 s:
#          torch.compile comes last, and what it had no time for is listed; a second call measures it
# memory   the allocator's peak of training steps of large models, beside what is counted: 440 s
# generate tokens a second with an image, routed and folded in, in at most 100 seconds
# profile  bytes by Nsight Compute, where it is installed, in at most 440 s
# sanitize every kernel under compute-sanitizer, where it is installed, in at most 300 s
# all      tests, ceilings, 16 operations and one step, in nine minutes
#
# Runs from a checkout without installing anything. What was measured stays in WORK (runs/gpu), and a
# second call goes on from there; a part that is killed or fails stops no other. The folder OUT gets
# logs.tar.gz and, of what was measured, summary.json, summary.md, memory.json and generation.json; the
# summary is printed last.
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-all}
parts="tests ops peers autotune long models steps memory generate profile sanitize all"
[[ $part != *" "* && " $parts " == *" $part "* ]] || {
    echo "bench/gpu.sh: part must be one of $parts; got '$part'" >&2; exit 2
}

WORK=${WORK:-runs/gpu}
OUT=${OUT:-runs/gpu-out}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
HEADLINE=${HEADLINE:-headline}  # another grid for a rehearsal
AUTOTUNE=${AUTOTUNE:-op/*/mul/d768/r64/M32768/*}  # of that grid
LONG=${LONG:-long}
MODELS=${MODELS:-models}
STEP=${STEP:-step/gpt2/qkv/*}  # of that grid, in all
STEPS=${STEPS:-steps}
GENERATE=${GENERATE:-}  # more options of python -m bench generate
for folder in WORK OUT; do
    mkdir -p "${!folder}" 2>/dev/null && [ -w "${!folder}" ] || {
        echo "bench/gpu.sh: $folder must be a folder that can be written; got '${!folder}'" >&2; exit 2
    }
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# A checkout that was copied without links has files in their place.
for layer in kernels training; do
    [ -d "fused_route/$layer" ] || { rm -f "fused_route/$layer"; ln -s "../$layer" "fused_route/$layer"; }
done

RESULT=$WORK/results.json
FEW="--provider reference --provider compile-folded --provider matmul-order --provider fused"
TRIALS="--provider fused-along --provider fused-overlapped"
EVERY="$FEW $TRIALS --provider published --provider peft --provider frozen --provider full --provider copy"
PEERS="$EVERY --provider compile --provider fused-p1"
LONG_WAYS="--provider reference --provider compile-folded --provider fused --provider fused-serial"
MODEL_WAYS="--provider reference --provider fused --provider peft --provider frozen"
STEP_WAYS="--provider reference --provider fused --provider frozen --provider compile --last compile"
TUNED_WAYS="--provider reference --provider fused --provider max-autotune"
failed=()
child= at= interrupted=

# What there is so far goes to OUT: after every part, and meanwhile every 20 seconds, because a kill
# leaves no time for it.
publish() {
    [ -f "$RESULT" ] && cp "$RESULT" "$OUT/summary.json"
    for part_of in memory generation; do
        [ -f "$WORK/$part_of.json" ] && cp "$WORK/$part_of.json" "$OUT/$part_of.json"
    done
    tar -czf "$OUT/logs.tar.gz.new" -C "$WORK" . 2>/dev/null
    mv -f "$OUT/logs.tar.gz.new" "$OUT/logs.tar.gz"
}

# limited SECONDS NAME COMMAND…: its output goes to a log, and its last lines to the screen.
limited() {
    local seconds=$1 name=$2 next=0; shift 2
    at=$name
    echo "== $name (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" > "$WORK/$name.log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 1  # short, so that a signal is seen
        ((++next % 20)) || publish
    done
    wait "$child"
    local code=$?
    child= at=
    tr '\r' '\n' < "$WORK/$name.log" | tail -n 12 | cut -c -200
    [ $code -eq 0 ] || { failed+=("$name ($code)"); echo "== $name: exit $code"; }
    publish
}

bench() { echo "$PYTHON -m bench --device $DEVICE --out $RESULT"; }

# Kernels compile in one thread: several processes at once, where pytest-xdist is. pytest-benchmark
# warns of those, and a warning is an error.
tests() {
    local several=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && several=(-n "${TEST_PROCESSES:-8}")
    limited "$1" tests "$PYTHON" -m pytest -v -rf --tb=line -p no:cacheprovider -p no:benchmark \
        "${several[@]}" -m gpu tests/test_gpu.py tests/test_gpu_overlap.py tests/test_gpu_models.py
}
# ops SECONDS OPTIONS…, and the same by another name.
ops() { operations "$1" ops "${@:2}"; }
peers() { operations "$1" peers "${@:2}"; }
operations() {
    limited "$1" "$2" $(bench) --grid "$HEADLINE" --case 'op/*' --warm 8 --budget "$(($1 - 40))" "${@:3}"
}
# None begun in the last 120 s: a shape may take 80.
autotune() {
    limited "$1" autotune $(bench) --grid "$HEADLINE" --case "$AUTOTUNE" --budget "$(($1 - 120))" \
        $TUNED_WAYS "${@:2}"
}
long() { limited "$1" long $(bench) --grid "$LONG" --warm 8 --budget "$(($1 - 40))" $LONG_WAYS; }
models() { limited "$1" models $(bench) --grid "$MODELS" --budget "$(($1 - 60))" $MODEL_WAYS "${@:2}"; }
# To compile a whole model takes up to a minute: all at once, and none begun in the last 35 s.
steps() { limited "$1" steps $(bench) --grid "$STEPS" --warm 6 --budget "$(($1 - 35))" $STEP_WAYS "${@:2}"; }
memory() { limited "$1" memory "$PYTHON" -m bench memory --device "$DEVICE" --out "$WORK/memory.json" "${@:2}"; }
generate() {
    limited "$1" generate "$PYTHON" -m bench generate --device "$DEVICE" --budget "$(($1 - 40))" \
        --out "$WORK/generation.json" $GENERATE
}
profile() {
    PATH=$PATH:/usr/local/cuda/bin
    limited "$1" profile "$PYTHON" -m bench profile "$RESULT" --budget "$(($1 - 30))"
}

# Its tools at once, each with a log of its records (.txt) beside what the program prints (.log).
# Before them the program alone, in processes that share the compiling: Triton's cache is then warm.
# No allocation lies within another, so that memcheck sees the end of each tensor.
sanitize() {
    local logs=() tool
    limited 90 sanitize-compile bash -c \
        'for i in {0..11}; do "$0" -m bench.sanitize --device "$1" --share "$i/12" & done; wait' \
        "$PYTHON" "$DEVICE"
    limited 60 sanitize-alone "$PYTHON" -m bench.sanitize --device "$DEVICE"
    PATH=$PATH:/usr/local/cuda/bin
    command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not here"; return; }
    for tool in memcheck racecheck initcheck; do logs+=("$WORK/sanitize-$tool.txt"); done
    rm -f "${logs[@]}" "${logs[@]/%.txt/.log}"
    limited "$1" sanitize-tools bash -c 'export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        python=$0 device=$1; shift
        for log; do
            tool=${log##*-}
            compute-sanitizer --tool "${tool%.txt}" --print-limit 1000000 --show-backtrace device \
                --log-file "$log" \
                "$python" -m bench.sanitize --device "$device" > "${log%.txt}.log" 2>&1 &
        done; wait' "$PYTHON" "$DEVICE" "${logs[@]}"
    limited 30 sanitize "$PYTHON" -m bench.sanitize summarise "${logs[@]}"
}

summarise() {
    trap '' EXIT TERM INT
    if [ -n "${child:-}" ]; then kill -TERM "$child" 2>/dev/null; wait "$child" 2>/dev/null; fi
    [ -z "$interrupted" ] || failed+=("interrupted in ${at:-$part}")
    local written=() more= file
    if [ -f "$RESULT" ]; then
        if timeout 60 "$PYTHON" -m bench report "$RESULT" --out "$WORK/report" \
            > "$WORK/report.log" 2>&1 && cp "$WORK/report/report.md" "$OUT/summary.md"
        then
            more="; $OUT/summary.md says more"
        else
            failed+=("report")
        fi
        tail -n 80 "$WORK/report.log"
    fi
    publish
    echo "failed: ${failed[*]:-nothing}"
    for file in summary memory generation; do
        [ -f "$OUT/$file.json" ] && written+=("$OUT/$file.json")
    done
    if [ ${#written[@]} -gt 0 ]; then
        echo "next: copy ${written[*]} to bench/results/$more"
    else
        echo "next: nothing was measured; read $OUT/logs.tar.gz"
    fi
    exit "${interrupted:-$((${#failed[@]} > 0))}"
}
trap summarise EXIT
trap 'interrupted=143; summarise' TERM
trap 'interrupted=130; summarise' INT

case $part in
    tests) tests 440;;
    ops) ops 440 --processes "${PROCESSES:-1}" --seconds 0.12 $EVERY;;
    peers) peers 470 --processes 1 --seconds 0.12 $PEERS;;
    autotune) autotune 360 --processes 1 --seconds 0.12;;
    long) long 240;;
    models) models 440 --processes 2;;
    steps) steps 150 --processes 1 --seconds 0.3;;
    memory) memory 440;;
    generate) generate 100;;
    profile) profile 440;;
    sanitize) sanitize 120;;
    all)
        tests 170
        ops 290 --processes 2 --seconds 0.15 $FEW
        models 80 --processes 1 --case "$STEP"
        ;;
esac
