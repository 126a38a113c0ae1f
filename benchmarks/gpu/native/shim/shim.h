// Stands in for the few torch headers that the kernels of other projects include, so that they build with nvcc alone
// and load through a C interface under any torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <variant>
#include <vector>

#include <cuda_runtime.h>

#define TORCH_CHECK(condition, ...)                                      \
  do {                                                                   \
    if (!(condition)) throw std::runtime_error("check: " #condition);    \
  } while (0)

namespace c10 {
struct Half {};
struct BFloat16 {};
enum class ScalarType { Byte, Int, Float, Half, BFloat16 };
template <typename T>
struct CppTypeToScalarType {
  static constexpr ScalarType value = ScalarType::Float;
};
}  // namespace c10

namespace at {
using ScalarType = c10::ScalarType;
using Half = c10::Half;
using BFloat16 = c10::BFloat16;
}  // namespace at

namespace torch {
// A dense matrix with rows one after the other unless strides say otherwise.
struct Tensor {
  void* data = nullptr;
  int64_t sizes_[2] = {0, 0};
  int64_t strides_[2] = {0, 1};

  Tensor() = default;
  Tensor(void const* pointer, int64_t rows, int64_t cols)
      : data(const_cast<void*>(pointer)), sizes_{rows, cols}, strides_{cols, 1} {}
  int64_t dim() const { return 2; }
  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  int64_t numel() const { return sizes_[0] * sizes_[1]; }
  void const* const_data_ptr() const { return data; }
  void* data_ptr() const { return data; }
  void* mutable_data_ptr() const { return data; }
  template <typename T>
  T* data_ptr() const {
    return static_cast<T*>(data);
  }
};
}  // namespace torch

namespace at {
using Tensor = torch::Tensor;
}
