// How a kernel is put on a stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "params.h"

namespace epops {

template <class Params>
int launch_kernel(void (*kernel)(Params), const Params& p, const Launch& launch, uint64_t shared_bytes,
                  cudaStream_t stream) {
  // One split of L1 and shared memory for all kernels: a multiprocessor has to run empty before it can change to
  // another.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  if (shared_bytes > 32 * 1024) {  // with what is static it must not be more than 48 KiB otherwise
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.num_blocks);
  config.blockDim = dim3(launch.num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = launch.pdl != 0 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Calls `run` with a value of the type of a dispatch's rows; bytes are rows that travel as they are.
template <class Run>
int with_row_type(int32_t dtype, Run run) {
  switch (dtype) {
    case kBf16:
      return run(__nv_bfloat16{});
    case kFp16:
      return run(__half{});
    case kFp32:
      return run(float{});
    default:
      return run(uint8_t{});
  }
}

}  // namespace epops
