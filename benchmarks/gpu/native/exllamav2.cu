// The C interface of ExLlamaV2's kernels for GPTQ weights, launched on the caller's stream: build.py writes the stream
// into their launches. Above 50 rows it decodes to fp16 for a cuBLAS product, which is the caller's part.
#include "shim.h"

static cudaStream_t current_stream = nullptr;

#define cublasHandle_t void*
#include "exllamav2_q_matrix.inc"
#undef BLOCK_KN_SIZE
#undef THREADS_X
#undef THREADS_Y
#include "exllamav2_q_gemm.inc"

extern "C" void* exllamav2_matrix(uint32_t* qweight, uint32_t* qzeros, half* scales, half* temp, int k, int n,
                                  int groups) {
  current_stream = nullptr;
  auto* matrix = new QMatrix(0, k, n, groups, qweight, nullptr, nullptr, nullptr, nullptr, nullptr, qzeros, scales,
                             nullptr, temp);
  cudaDeviceSynchronize();
  return matrix;
}

extern "C" int exllamav2_mm(half const* a, void* matrix, half* c, int m, int n, int k, void* stream) {
  current_stream = static_cast<cudaStream_t>(stream);
  auto* own = static_cast<QMatrix*>(matrix);
  int whole = m / BLOCK_M_SIZE_MAX * BLOCK_M_SIZE_MAX;
  if (whole) gemm_half_q_half_cuda_part(a, own, c, whole, n, k, BLOCK_M_SIZE_MAX, true);
  if (m > whole) gemm_half_q_half_cuda_part(a + whole * k, own, c + whole * n, m - whole, n, k, m - whole, true);
  return static_cast<int>(cudaGetLastError());
}

extern "C" int exllamav2_dequantize(void* matrix, half* out, void* stream) {
  current_stream = static_cast<cudaStream_t>(stream);
  static_cast<QMatrix*>(matrix)->reconstruct(out);
  return static_cast<int>(cudaGetLastError());
}
