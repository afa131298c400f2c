// Conditions on tensors that every op states first.  A broken one becomes a RuntimeError that names the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#define O_VOXEL_CHECK_DTYPE(tensor, wanted) \
  TORCH_CHECK((tensor).scalar_type() == (wanted), #tensor " must be ", (wanted), ", not ", (tensor).scalar_type())

#define O_VOXEL_CHECK_COLUMNS(tensor, columns)                                                            \
  TORCH_CHECK((tensor).dim() == 2 && (tensor).size(1) == (columns), #tensor " must have shape (N, ", (columns), \
              "), not ", (tensor).sizes())

#define O_VOXEL_CHECK_SAME_DEVICE(tensor, other)                                                             \
  TORCH_CHECK((tensor).device() == (other).device(), #tensor " is on ", (tensor).device(), " but " #other " is on ", \
              (other).device())

namespace o_voxel {

// The tensor, contiguous and with its first element on a 16-byte border, as kernels that load four words ask.
inline at::Tensor packed(const at::Tensor& tensor) {
  at::Tensor result = tensor.contiguous();
  if (reinterpret_cast<std::uintptr_t>(result.const_data_ptr()) % 16 != 0) {
    result = result.clone();
  }
  return result;
}

}  // namespace o_voxel
