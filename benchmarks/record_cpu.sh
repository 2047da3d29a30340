#!/usr/bin/env bash
# Every recorded CPU time again, each file by the command in its head; then the report:
#
#     benchmarks/record_cpu.sh              # needs python3 with slimgemm[test] installed
#
# Seven minutes where nothing else runs. $OUT (out/record, unless given) has each file as soon as it
# is measured; only when all are there do they replace those in benchmarks/results, so that the
# tree that is measured stays the one that is committed.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
out="${OUT:-out/record}"
mkdir -p "$out"
export OMP_NUM_THREADS=1  # its clock counts the CPU time of the thread, not what others take

for op in spmm_24 spmm_24_dgrad spmm_24_wgrad spmm_24_step spmm_24_epilogue pack_24 prune_24 overhead \
    conv2d_24 conv2d_24_dgrad conv2d_24_wgrad gemm_channels gemm_channels_dgrad \
    gemm_channels_wgrad conv2d_channels conv2d_channels_dgrad conv2d_channels_wgrad models; do
    "$python" -m slimgemm.benchmarks.cli bench --op "$op" --shapes small --no-compiled --out "$out"
done
"$python" -m slimgemm.benchmarks.bench_cpu --threads 1 --seconds 1 --out "$out/cpu_layers.json"
"$python" -m pytest tests/benchmarks/test_bench_cpu.py --benchmark-enable \
    --benchmark-timer=time.thread_time --benchmark-min-rounds=7 --benchmark-max-time=0.5 \
    --benchmark-json="$out/micro.json"
"$python" -m slimgemm.benchmarks.micro "$out/micro.json" --out "$out"

cp "$out"/cpu_*.csv "$out"/cpu_layers.json benchmarks/results/
"$python" -m slimgemm.benchmarks.report
