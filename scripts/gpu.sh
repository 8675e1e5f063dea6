#!/usr/bin/env bash
# Everything that a machine with GPUs is for, in one command: `scripts/gpu.sh STAGE …`, from the repository's root.
#   build       the extension, in place
#   virtual     many ranks on one GPU, against the reference
#   ranks       one process a GPU: transport, graphs, timeouts, FSDP2 beside exchanges (EPOPS_TESTS_SHARE_GPU=1: all on one GPU)
#   models      decoding in CUDA graphs, fp8 products, rows between grouped products, fused quantizers
#   nccl        the c10d transport on nccl, against gloo
#   sanitize    compute-sanitizer memcheck and racecheck over a small set of the virtual ranks, alone on the GPU; racecheck
#               of 2025.3 (CUDA 13.0) is wrong about mbarriers: COMPUTE_SANITIZER=that of the wheel nvidia-cuda-sanitizer-api 13.5
#   overlap     an MoE layer with and without the overlap pass
#   bench       dispatch and combine; results go to $OUT or benchmarks/results
#   one_gpu     dispatch and combine with all ranks on one GPU
#   exchange    all_to_all
#   vdev        torch's exchanges with splits on the device, in processes of their own
#   mla         latent attention: the example, and both cores at decode
#   decode      a decode step beside other ways, rows with room to spare, and a soak
#   together    every test on two GPUs, side by side where they do not disturb one another: about 260 s
# Each stage has its own time limit, so that a hang costs little; the last line says which stages passed.
set -uo pipefail
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results="${OUT:-benchmarks/results}"
mkdir -p "$results"
gpus=$(nvidia-smi -L | wc -l)
summary=""
PYTEST="python3 -m pytest -q -o addopts= -p no:cacheprovider --timeout-method thread"
stage() {
  local name="$1" limit="$2"
  shift 2
  echo "== $name: $*"
  local start=$SECONDS
  timeout --kill-after=5 "$limit" "$@"
  local status=$?
  summary+="$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - start)) s; "
}
# Tests on some GPUs, behind which nothing waits: name, GPUs, limit, what.
beside() {
  local name="$1" devices="$2" limit="$3"
  shift 3
  CUDA_VISIBLE_DEVICES="$devices" timeout --kill-after=5 "$limit" $PYTEST --maxfail 3 --timeout 120 "$@" >"$results/$name.pytest" 2>&1 &
  pids+=($!)
}
for name in "$@"; do
  case "$name" in
    build) stage build 180 env EPOPS_BUILD_CUDA=1 NVCC_APPEND_FLAGS="${NVCC_FLAGS:-}" python3 setup.py --quiet egg_info build_ext --inplace ;;
    virtual) stage virtual 240 $PYTEST --maxfail ${MAXFAIL:-5} --timeout 60 tests/gpu/test_virtual_ranks.py tests/gpu/test_virtual_all_to_all.py ${TESTS:+-k "$TESTS"} ;;
    ranks) stage ranks 300 $PYTEST --maxfail 4 --timeout 100 tests/gpu/test_nvlink.py tests/gpu/test_nvlink_all_to_all.py tests/gpu/test_fsdp.py ${TESTS:+-k "$TESTS"} ;;
    models) stage models 400 $PYTEST --timeout 120 tests/gpu/test_decode.py tests/gpu/test_scaled_grouped_mm.py tests/gpu/test_row_kernel.py tests/gpu/test_fuse_quant.py ${TESTS:+-k "$TESTS"} ;;
    sanitize)
      for tool in memcheck racecheck; do
        stage "$tool" 200 "${COMPUTE_SANITIZER:-compute-sanitizer}" --tool "$tool" --error-exitcode 9 \
          $PYTEST -x --timeout 190 tests/gpu/test_virtual_ranks.py tests/gpu/test_virtual_all_to_all.py -k "${SANITIZE:-hostile or many_ops or (every_way and expert-2) or (by_streams and expert-2) or even_parts or room}"
      done ;;
    nccl) stage nccl 150 $PYTEST --timeout 100 tests/gpu/test_nccl.py ;;
    overlap) stage overlap 200 torchrun --nproc-per-node "$gpus" benchmarks/bench_overlap.py --out "$results" ;;
    bench) stage bench 300 torchrun --nproc-per-node "$gpus" benchmarks/bench_dispatch_combine.py --out "$results" ${BENCH:-} ;;
    one_gpu) stage one_gpu 120 python3 benchmarks/bench_one_gpu.py ;;
    exchange) stage exchange 120 torchrun --nproc-per-node "$gpus" benchmarks/bench_all_to_all.py --device cuda --runs 5 --out "$results/all_to_all.json" ;;
    vdev)
      [ -f "$results/all_to_all.json" ] || cp benchmarks/results/all_to_all.json "$results/"
      stage vdev 90 torchrun --nproc-per-node "$gpus" benchmarks/bench_all_to_all.py --device cuda --vdev --runs 5 --out "$results/all_to_all.json"
      stage vdev_2d 60 torchrun --nproc-per-node "$gpus" benchmarks/bench_vdev_2d.py ;;
    mla)
      stage mla-example 120 torchrun --nproc-per-node "$gpus" examples/mla_data_parallel.py --device cuda
      stage mla 150 torchrun --nproc-per-node "$gpus" benchmarks/bench_mla.py --device cuda --out "$results/mla.json" ;;
    decode)
      stage decode "${DECODE:-400}" python3 benchmarks/bench_decode.py --config 30b --batch 64 --dtype bfloat16 --profile --limit 90 --out "$results" ${DECODE_ARGS:---how eager captured}
      stage padding 60 python3 benchmarks/bench_padding.py --room 1 16 --out "$results/padding.json"
      stage soak "${SOAK:-300}" python3 benchmarks/soak_decode.py --device cuda --steps 20000 --every 500 --buckets 1 8 32 --out "$results/soak.json" ;;
    together)
      pids=()
      beside virtual 0 200 tests/gpu/test_virtual_ranks.py
      beside virtual-all-to-all 1 200 tests/gpu/test_virtual_all_to_all.py tests/gpu/test_row_kernel.py
      beside nvlink 0,1 150 tests/gpu/test_nvlink.py -k "not stalls and not killed and not memory"
      beside exchanges 0,1 200 tests/gpu/test_nvlink_all_to_all.py tests/gpu/test_fsdp.py tests/gpu/test_nccl.py
      wait "${pids[@]}"
      pids=()
      beside decode 0,1 200 tests/gpu/test_decode.py -k "mixtral or qwen3 or bfloat16"
      beside decode-others 0,1 200 tests/gpu/test_decode.py -k "not (mixtral or qwen3 or bfloat16)"
      beside fp8 0,1 200 tests/gpu/test_fuse_quant.py tests/gpu/test_scaled_grouped_mm.py
      wait "${pids[@]}"
      for log in "$results"/*.pytest; do
        summary+="$(basename "$log" .pytest): $(grep -E 'passed|failed|error' "$log" | tail -1); "
        grep -qE '[0-9]+ passed' "$log" && ! grep -qE '[0-9]+ (failed|error)' "$log" || summary+="FAILED; "
        grep -E '^(FAILED|ERROR)' "$log" | head -5
        rm "$log"
      done
      stage alone 110 $PYTEST --maxfail 4 --timeout 100 tests/gpu/test_nvlink.py -k "stalls or killed or memory" ;;
    *) echo "gpu.sh: no stage $name" >&2; exit 2 ;;
  esac
done
echo "$summary"
case "$summary" in *FAILED*) exit 1 ;; esac
