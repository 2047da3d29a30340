#!/usr/bin/env bash
# Everything that a GPU has to say, the most important first, in nine minutes at most:
#
#     OUT=folder benchmarks/gpu_check.sh              # needs python3 with torch, triton, pytest
#     benchmarks/gpu_check.sh --dry-run               # says what would run, and for how long
#     benchmarks/gpu_check.sh --tiny                  # runs it on tiny shapes, GPU or not
#     benchmarks/gpu_check.sh --only spmm_24          # this part alone; may be repeated
#
# Each part is a process of its own with a time limit of its own. After each part $OUT (out, unless
# given) holds what there is by then: summary.txt, log.txt and results.tar.gz with every recorded
# file. A kernel that hangs or faults costs the test that ran it, not the part (tests/gpu_guard.py).
# SLIMGEMM_COMMIT names the commit where there is no git. Exit code 1 if a part failed, 2 for bad
# input.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" tiny="" only=()
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --tiny) tiny=1 ;;
        --only) only+=("${2:?--only needs the name of a part}"); shift ;;
        *) echo "error: unknown argument $1; there are --dry-run, --tiny, --only" >&2; exit 2 ;;
    esac
    shift
done
known=""
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
export PYTHONPATH="$work/site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What is compiled and tuned here must not come from, or stay in, a cache of somebody else.
export XDG_CACHE_HOME="$work/cache" TRITON_CACHE_DIR="$work/cache/triton"

: > "$out/log.txt"
printf '%-34s %8s %8s  %s\n' part limit_s took_s result > "$out/summary.txt"
failed=0

save() {
    cp "$out/summary.txt" "$out/log.txt" "$work/results/"
    tar -czf "$out/.results" -C "$work" results && mv "$out/.results" "$out/results.tar.gz"
}

wanted() {  # NAME
    local one
    [ ${#only[@]} -eq 0 ] && return 0
    for one in "${only[@]}"; do [ "$one" = "$1" ] && return 0; done
    return 1
}

# part NAME SECONDS COMMAND...
part() {
    local name="$1" most="$2" left=$((limit - SECONDS)) status=0 start=$SECONDS
    local counted="${count_tests:-}" said=""
    known="$known, $name"
    wanted "$name" || return 0
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
    # Interrupted at its limit, it still says what it knows; what waits for a GPU that hangs hears
    # nothing, and is ended with its process group.
    timeout -s INT -k 8 "$most" "$@" >> "$out/log.txt" 2>&1 || status=$?
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
    # Its own options, so that a plugin that is missing ends nothing; a line in the log per test.
    SLIMGEMM_TEST_JOURNAL="$work/journal/${name// /_}" OMP_NUM_THREADS=1 count_tests=1 \
        part "$name" "$most" "$python" -m pytest -v $workers -p gpu_guard \
        -o addopts="--import-mode=importlib -ra" --continue-on-collection-errors \
        --junitxml="$work/results/${name// /_}.xml" "$@"
}

bench_part() {  # NAME SECONDS ARGUMENTS...
    local name="$1" most="$2" begin=$(($2 * 8 / 10))
    shift 2
    part "$name" "$most" "$python" -m slimgemm.benchmarks.cli bench --out "$work/results" \
        --seconds "$begin" "$@"
}

shapes=check workers=""
# Building some 300 kernels is most of what the tests do, a second or two each: side by side. A
# test that breaks the GPU's context, or never ends, takes one worker with it, and xdist starts
# another.
cores="$(nproc)"
side_by_side=$((cores > 16 ? 12 : cores > 6 ? cores - 4 : 2))
"$python" -c "import xdist" 2> /dev/null && workers="-n $side_by_side --max-worker-restart=99"
[ -n "$tiny" ] && shapes=tiny
nvidia-smi >> "$out/log.txt" 2>&1 || echo "no nvidia-smi" >> "$out/log.txt"

gluon=tests/kernels/gluon/test_gpu.py
# Without a GPU, or tiny, they are collected and skipped, which still finds a broken import.
[ -n "$tiny" ] || part "machine" 15 "$python" -c "import torch, triton; \
gpu = torch.cuda.get_device_properties(0); total = torch.ones(9, device='cuda').sum().item(); \
print(torch.__version__, triton.__version__, gpu, total)"
test_part "instructions" 90 "$gluon"
if [ -z "$tiny" ]; then
    # By file: each worker would import every test first.
    mapfile -t marked < <(grep -rl --include='test_*.py' 'mark\.gpu$\|@pytest\.mark\.gpu' tests |
        grep -vx "$gluon" | sort)
    test_part "gpu tests" 50 -m gpu "${marked[@]}"
    test_part "kernels against their twins" 45 tests/kernels/test_spmm_24.py \
        tests/kernels/test_pack_24.py tests/kernels/test_gemm_channels.py \
        tests/kernels/test_conv_24.py tests/kernels/test_conv_channels.py
    # Without --out: the table goes where dispatch looks for it, so that the parts below use it.
    # Of all tiles, a row takes minutes. The second run leaves out what ended the first, or goes on.
    tune=("$python" -m slimgemm.benchmarks.cli tune --quick --tokens "1,64,4096")
    part "tune" 45 "${tune[@]}" --minutes 0.55
    part "tune, resumed" 25 "${tune[@]}" --minutes 0.25
    [ -d "$work/cache/slimgemm" ] && cp -r "$work/cache/slimgemm" "$work/results/tune"
fi
bench_part "spmm_24" 110 --op spmm_24 --shapes "$shapes" --no-compiled
bench_part "packing and overhead" 25 --op overhead --op pack_24 --op prune_24 \
    --shapes "$shapes" --no-compiled
bench_part "models" 50 --op models --shapes "$shapes" --no-compiled
bench_part "8 bits and convolutions" 40 --op scaled_spmm_24 --op conv2d_24 \
    --shapes "$shapes" --no-compiled
bench_part "gradients and channels" 30 --op spmm_24_dgrad --op spmm_24_wgrad --op spmm_24_step \
    --op gemm_channels --op conv2d_channels --op conv2d_24_dgrad --op conv2d_24_wgrad \
    --op spmm_24_epilogue --op gemm_channels_dgrad --op gemm_channels_wgrad \
    --op conv2d_channels_dgrad --op conv2d_channels_wgrad --shapes "$shapes" --no-compiled
# With what time is left: compiling takes a minute for a few shapes.
bench_part "spmm_24 against max-autotune" 120 --op spmm_24 --shapes "$shapes" \
    --out "$work/results/compiled" $([ -n "$tiny" ] && echo --no-compiled)
for file in "$work"/results/compiled/*.csv; do
    # As benchmarks/report.py looks for it.
    [ -e "$file" ] && mv "$file" "$work/results/$(basename "$file" .csv)_compiled.csv" && save
done

for one in ${only[@]+"${only[@]}"}; do
    [[ "$known, " = *", $one, "* ]] && continue
    echo "error: no part is named $one; there are ${known#, }" >&2
    exit 2
done
cat "$out/summary.txt"
exit "$failed"
