#!/usr/bin/env bash
# Everything that a machine with GPUs is for, in one command: `scripts/gpu.sh STAGE …`, from the repository's root.
#   build       the extension, in place
#   virtual     many ranks on one GPU, against the reference
#   ranks       one process a GPU: transport, graphs, timeouts
#   nccl        the c10d transport on nccl, against gloo
#   sanitize    compute-sanitizer memcheck and racecheck over a small set of the virtual ranks
#   overlap     an MoE layer with and without the overlap pass
#   bench       the benchmark; results go to $OUT or benchmarks/results
# Each stage has its own time limit, so that a hang costs little; the last line says which stages passed.
set -uo pipefail
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results="${OUT:-benchmarks/results}"
mkdir -p "$results"
gpus=$(nvidia-smi -L | wc -l)
summary=""
stage() {
  local name="$1" limit="$2"
  shift 2
  echo "== $name: $*"
  local start=$SECONDS
  timeout --kill-after=5 "$limit" "$@"
  local status=$?
  summary+="$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - start)) s; "
}
for name in "$@"; do
  case "$name" in
    build) stage build 180 env EPOPS_BUILD_CUDA=1 NVCC_APPEND_FLAGS="${NVCC_FLAGS:-}" python3 setup.py --quiet egg_info build_ext --inplace ;;
    virtual) stage virtual 240 python3 -m pytest -q --maxfail ${MAXFAIL:-5} --timeout 60 --timeout-method thread tests/gpu/test_virtual_ranks.py ${TESTS:+-k "$TESTS"} ;;
    ranks) stage ranks 240 python3 -m pytest -q --maxfail 4 --timeout 100 --timeout-method thread tests/gpu/test_nvlink.py ${TESTS:+-k "$TESTS"} ;;
    sanitize)
      for tool in memcheck racecheck; do
        stage "$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          python3 -m pytest -q -x -p no:cacheprovider --timeout 190 tests/gpu/test_virtual_ranks.py -k "${SANITIZE:-hostile or many_ops}"
      done ;;
    nccl) stage nccl 150 python3 -m pytest -q --timeout 100 --timeout-method thread tests/gpu/test_nccl.py ;;
    overlap) stage overlap 200 torchrun --nproc-per-node "$gpus" benchmarks/bench_overlap.py --out "$results" ;;
    bench) stage bench 300 torchrun --nproc-per-node "$gpus" benchmarks/bench_dispatch_combine.py --out "$results" ${BENCH:-} ;;
    *) echo "gpu.sh: no stage $name" >&2; exit 2 ;;
  esac
done
echo "$summary"
case "$summary" in *FAILED*) exit 1 ;; esac
