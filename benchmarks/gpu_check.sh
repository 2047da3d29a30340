#!/usr/bin/env bash
# Everything that a GPU has to say, the most important first, in nine minutes at most:
#
#     OUT=folder benchmarks/gpu_check.sh              # needs python3 with torch, triton, pytest
#     benchmarks/gpu_check.sh --dry-run               # says what would run, and for how long
#     benchmarks/gpu_check.sh --tiny                  # runs it on tiny shapes, GPU or not
#
# Each part has a time limit of its own. After each part $OUT (out, unless given) holds what there
# is by then: summary.txt, log.txt and results.tar.gz with every recorded file. Exit code 1 if a
# part failed, 2 for bad input.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" tiny=""
for word in "$@"; do
    case "$word" in
        --dry-run) dry=1 ;;
        --tiny) tiny=1 ;;
        *) echo "error: unknown argument $word; there are --dry-run and --tiny" >&2; exit 2 ;;
    esac
done
python="${PYTHON:-python3}"
limit="${GPU_CHECK_SECONDS:-$([ -n "$tiny" ] && echo 1800 || echo 525)}"  # of all parts together
out="${OUT:-out}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/site/slimgemm" "$work/results"
# The package under its import name, installed or not.
for folder in kernels sparse_ops pruning benchmarks; do
    ln -s "$PWD/$folder" "$work/site/slimgemm/$folder"
done
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What is compiled and tuned here must not come from, or stay in, a cache of somebody else.
export XDG_CACHE_HOME="$work/cache" TRITON_CACHE_DIR="$work/cache/triton"

: > "$out/log.txt"
printf '%-34s %8s %8s  %s\n' part limit_s took_s result > "$out/summary.txt"
failed=0

save() {
    cp "$out/summary.txt" "$out/log.txt" "$work/results/"
    tar -czf "$out/.results" -C "$work" results && mv "$out/.results" "$out/results.tar.gz"
}

# part NAME SECONDS COMMAND...
part() {
    local name="$1" most="$2" left=$((limit - SECONDS)) status=0 start=$SECONDS
    local counted="${count_tests:-}" said=""
    # Tiny shapes take no time of their own, but a CPU may be busy or slow.
    [ -n "$tiny" ] && most=$((most * 4))
    shift 2
    if [ -n "$dry" ]; then
        printf '%-34s %8s %8s  %s\n' "$name" "$most" - "$*" | tee -a "$out/summary.txt"
        return
    fi
    if [ "$left" -lt 5 ]; then
        printf '%-34s %8s %8s  %s\n' "$name" "$most" 0 "no time left" | tee -a "$out/summary.txt"
        failed=1
        save
        return
    fi
    [ "$left" -lt "$most" ] && most="$left"
    echo "== $name: $*" | tee -a "$out/log.txt"
    # A process group that outlives its limit is ended for good five seconds later.
    timeout -k 5 "$most" "$@" >> "$out/log.txt" 2>&1 || status=$?
    local result="ok"
    [ "$status" -eq 124 ] || [ "$status" -eq 137 ] && result="cut off"
    [ "$status" -ne 0 ] && [ "$result" = ok ] && result="failed ($status)"
    if [ -n "$counted" ]; then
        # A test that is skipped shows nothing: how many passed is part of the result.
        local last
        last="$(tail -n 1 "$out/log.txt")"
        [ "$result" = ok ] && [ -z "$tiny" ] && [[ "$last" != *" passed"* ]] && result="none passed"
        [[ "$last" = *" in "*s* ]] && said=": ${last//=/}"
    fi
    [ "$result" = ok ] || failed=1
    result="$result$said"
    printf '%-34s %8s %8s  %s\n' "$name" "$most" $((SECONDS - start)) "$result" |
        tee -a "$out/summary.txt"
    save
}

test_part() {  # NAME SECONDS PYTEST_ARGUMENTS...
    local name="$1" most="$2"
    shift 2
    # Its own options, so that a plugin that is missing ends nothing.
    count_tests=1 part "$name" "$most" "$python" -m pytest -q $workers \
        -o addopts="--import-mode=importlib -ra" \
        --junitxml="$work/results/${name// /_}.xml" "$@"
}

bench_part() {  # NAME SECONDS ARGUMENTS...
    local name="$1" most="$2" begin=$(($2 * 8 / 10))
    shift 2
    part "$name" "$most" "$python" -m slimgemm.benchmarks.cli bench --out "$work/results" \
        --seconds "$begin" "$@"
}

shapes=check workers=""
# Kernels compile side by side, and a test that breaks the GPU's context breaks one worker's.
"$python" -c "import xdist" 2> /dev/null && workers="-n 4"
[ -n "$tiny" ] && shapes=tiny
nvidia-smi >> "$out/log.txt" 2>&1 || echo "no nvidia-smi" >> "$out/log.txt"

gluon=tests/kernels/gluon/test_gpu.py
if [ -n "$tiny" ]; then
    # Without a GPU they are collected and skipped, which still finds a broken import.
    test_part "instructions" 60 "$gluon"
else
    test_part "instructions" 60 "$gluon"
    test_part "gpu tests" 60 -m gpu tests --ignore "$gluon"
    test_part "kernels against their twins" 75 tests/kernels/test_spmm_24.py \
        tests/kernels/test_pack_24.py tests/kernels/test_gemm_channels.py \
        tests/kernels/test_conv_24.py tests/kernels/test_conv_channels.py
fi
if [ -e benchmarks/cli_tune.py ] && [ -z "$tiny" ]; then
    # Without --out: the table goes where dispatch looks for it, so that the parts below use it.
    part "tune" 75 "$python" -m slimgemm.benchmarks.cli tune --minutes 1 --tokens 1,64,4096
    [ -d "$work/cache/slimgemm" ] && cp -r "$work/cache/slimgemm" "$work/results/tune"
fi
bench_part "spmm_24" 90 --op spmm_24 --shapes "$shapes" --no-compiled
bench_part "packing and overhead" 30 --op overhead --op pack_24 --op prune_24 \
    --shapes "$shapes" --no-compiled
bench_part "models" 75 --op models --shapes "$shapes" --no-compiled
bench_part "convolutions, channels, gradients" 40 --op conv2d_24 --op gemm_channels \
    --op conv2d_channels --op spmm_24_dgrad --op spmm_24_wgrad --op spmm_24_epilogue \
    --shapes "$shapes" --no-compiled
# With what time is left: compiling takes a minute for a few shapes.
bench_part "spmm_24 against max-autotune" 120 --op spmm_24 --shapes "$shapes" \
    --out "$work/results/compiled" $([ -n "$tiny" ] && echo --no-compiled)

cat "$out/summary.txt"
exit "$failed"
