// The C interface of one schedule of Machete: bf16 inputs, symmetric 4-bit weights with bf16 scales per group.
// Compiled once for each schedule: -DSCHEDULE=name -DTILE_N=.. -DTILE_M=.. -DCLUSTER=..; with -DPREPACK, what orders
// the weights instead.
#include "shim.h"

#include "cutlass_extensions/vllm_custom_types.cuh"
#include "machete_mm_kernel.cuh"
#ifdef PREPACK
  #include "machete_prepack_kernel.cuh"
#endif

using namespace cute;

#ifdef PREPACK
using Prepacked = machete::PrepackedLayoutBTemplate<cutlass::bfloat16_t, cutlass::uint4b_t, cutlass::bfloat16_t, float,
                                                    cutlass::layout::ColumnMajor,
                                                    cutlass::gemm::KernelTmaWarpSpecializedCooperative>;

// qweight: (K / 8, N) words with N strided by K / 8, the transposed view of (N, K / 8).
extern "C" int machete_prepack(void const* qweight, void* out, int n, int k, void* stream) {
  using Element = typename Prepacked::ElementB;
  using Stride = cutlass::detail::TagToStrideB_t<cutlass::layout::ColumnMajor>;
  Stride strides{};
  get<0>(strides) = k;
  auto layout = make_layout(make_shape(int64_t(n), int64_t(k), int64_t(1)), strides);
  try {
    machete::prepack_B_template<Prepacked>(static_cast<cudaStream_t>(stream), static_cast<Element const*>(qweight), layout,
                                           static_cast<Element*>(out));
  } catch (std::exception const& error) {
    std::cerr << "machete: " << error.what() << std::endl;
    return 1;
  }
  return static_cast<int>(cudaGetLastError());
}
#else
struct Schedule {
  using TileShapeNM = Shape<Int<TILE_N>, Int<TILE_M>>;
  using ClusterShape = Shape<Int<CLUSTER>, _1, _1>;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using TileScheduler = cutlass::gemm::StreamKScheduler;
  using EpilogueTileType = cutlass::epilogue::collective::EpilogueTileAuto;
};

using Kernel = machete::MacheteKernelTemplate<cutlass::bfloat16_t, cutlass::vllm_uint4b8_t, cutlass::bfloat16_t, float,
                                              cutlass::bfloat16_t, void, void, void,
                                              cutlass::gemm::KernelTmaWarpSpecializedCooperative, Schedule>;

static auto arguments(void const* a, void const* b, void* d, void const* scales, int m, int n, int k, int group,
                      void* stream) {
  torch::Tensor A(a, m, k), B(b, k / 8, n), D(d, m, n);
  std::optional<torch::Tensor> S(torch::Tensor(scales, k / group, n)), none;
  return Kernel::create_arguments(static_cast<cudaStream_t>(stream), A, B, D, S, none, int64_t(group), none, none);
}

  #define NAMED_(prefix, name) prefix##name
  #define NAMED(prefix, name) NAMED_(prefix, name)

extern "C" int64_t NAMED(machete_workspace_, SCHEDULE)(int m, int n, int k, int group) {
  return static_cast<int64_t>(Kernel::get_workspace_size(arguments(nullptr, nullptr, nullptr, &group, m, n, k, group, nullptr)));
}

extern "C" int NAMED(machete_mm_, SCHEDULE)(void const* a, void const* b, void* d, void const* scales, void* workspace,
                                            int m, int n, int k, int group, void* stream) {
  try {
    auto given = arguments(a, b, d, scales, m, n, k, group, stream);
    if (!Kernel::can_implement(given)) return -1;
    Kernel::run(given, workspace, static_cast<cudaStream_t>(stream));
  } catch (std::exception const& error) {
    std::cerr << "machete: " << error.what() << std::endl;
    return 1;
  }
  return static_cast<int>(cudaGetLastError());
}
#endif
