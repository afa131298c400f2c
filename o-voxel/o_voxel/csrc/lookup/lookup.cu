#include "lookup.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace o_voxel {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 16;  // beyond it the threads walk in strides

unsigned blocks_for(std::int64_t items) {
  return static_cast<unsigned>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
}

__device__ std::int64_t first_item() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ std::int64_t item_stride() {
  return static_cast<std::int64_t>(gridDim.x) * kThreads;
}

// One thread a voxel.  A slot is taken, tag and row at once, by the one 64-bit exchange that finds it free.
__global__ void fill_table(const int4* __restrict__ coords, std::int64_t n, unsigned long long* slots,
                           std::uint64_t capacity) {
  for (std::int64_t row = first_item(); row < n; row += item_stride()) {
    const int4 v = coords[row];
    const std::uint64_t hash = voxel_hash(v.x, v.y, v.z, v.w);
    const auto free_slot = static_cast<unsigned long long>(kFreeSlot);
    const auto value = static_cast<unsigned long long>(slot_value(hash, row));
    for (std::uint64_t probe = 0; probe < capacity; ++probe) {
      if (atomicCAS(slots + ((hash + probe) & (capacity - 1)), free_slot, value) == free_slot) {
        break;
      }
    }
  }
}

// One thread a query.
__global__ void find_rows(const std::int64_t* __restrict__ slots, std::uint64_t capacity,
                          const int4* __restrict__ coords, const int4* __restrict__ queries, std::int64_t m,
                          std::int64_t* __restrict__ rows) {
  for (std::int64_t i = first_item(); i < m; i += item_stride()) {
    const int4 q = queries[i];
    const std::uint64_t hash = voxel_hash(q.x, q.y, q.z, q.w);
    std::int64_t found = -1;
    for (std::uint64_t probe = 0; probe < capacity; ++probe) {
      const std::int64_t slot = slots[(hash + probe) & (capacity - 1)];
      if (slot == kFreeSlot) {
        break;
      }
      if (same_tag(slot, hash)) {
        const int4 v = coords[slot_row(slot)];
        if (v.x == q.x && v.y == q.y && v.z == q.z && v.w == q.w) {
          found = slot_row(slot);
          break;
        }
      }
    }
    rows[i] = found;
  }
}

const int4* as_int4(const at::Tensor& tensor) {
  return reinterpret_cast<const int4*>(tensor.const_data_ptr<std::int32_t>());
}

}  // namespace

at::Tensor voxel_table_cuda(const at::Tensor& coords) {
  const c10::cuda::CUDAGuard guard(coords.device());
  const std::int64_t n = coords.size(0);
  at::Tensor table = at::full({table_slots(n)}, kFreeSlot, coords.options().dtype(at::kLong));
  if (n > 0) {
    fill_table<<<blocks_for(n), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        as_int4(coords), n, reinterpret_cast<unsigned long long*>(table.mutable_data_ptr<std::int64_t>()),
        static_cast<std::uint64_t>(table.size(0)));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return table;
}

at::Tensor voxel_rows_cuda(const at::Tensor& table, const at::Tensor& coords, const at::Tensor& queries) {
  const c10::cuda::CUDAGuard guard(queries.device());
  const std::int64_t m = queries.size(0);
  at::Tensor rows = at::empty({m}, table.options());
  if (m > 0) {
    find_rows<<<blocks_for(m), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        table.const_data_ptr<std::int64_t>(), static_cast<std::uint64_t>(table.size(0)), as_int4(coords),
        as_int4(queries), m, rows.mutable_data_ptr<std::int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return rows;
}

}  // namespace o_voxel
