// The C interface of Marlin, bf16 inputs and symmetric 4-bit weights in groups of 128. build.py cuts the torch function
// off gptq_marlin.cu and leaves one row of its table of kernels.
#include "shim.h"

// As gptq_marlin.cu sets them above the part that is taken.
#define MARLIN_SHARED_MEM_GUARD_BYTES 0
#define MARLIN_MULTI_BLOCK_SHARED_MEM_GUARD_BYTES 0

#include "marlin_host.inc"
#include "marlin_repack.inc"

extern "C" int marlin_mm(void const* a, void const* b, void* c, void* c_tmp, void* scales, void* workspace, int m, int n,
                         int k, int group_size, int sms, void* stream) {
  try {
    marlin::marlin_mm<nv_bfloat16>(a, b, c, c_tmp, nullptr, scales, nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k,
                                   k, workspace, vllm::kU4B8, false, false, true, false, k / group_size, group_size, 0,
                                   static_cast<cudaStream_t>(stream), -1, -1, sms, false, true, false);
  } catch (std::exception const& error) {
    std::cerr << "marlin: " << error.what() << std::endl;
    return 1;
  }
  return static_cast<int>(cudaGetLastError());
}

extern "C" int marlin_repack(uint32_t const* qweight, uint32_t* out, int k, int n, int sms, int shared, void* stream) {
  auto kernel = marlin::gptq_marlin_repack_kernel<marlin::repack_threads, 4, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  kernel<<<sms, marlin::repack_threads, shared, static_cast<cudaStream_t>(stream)>>>(qweight, nullptr, out, k, n);
  return static_cast<int>(cudaGetLastError());
}
