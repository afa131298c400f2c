// Voxel -> row, through an open-addressing hash table.
//
// A table is an int64 tensor of 2^k slots, at least twice as many as voxels.  An occupied slot holds, in its upper
// half, 32 bits of the hash of a voxel, and in its lower half the voxel's row; a free slot holds -1.  Whoever finds
// its own 32 bits compares the coordinates themselves, so that every int32 coordinate is told from every other: no
// key is packed and none can overflow.  Probing is linear and ends at a free slot, or after a whole turn.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__CUDACC__)
#define O_VOXEL_HOST_DEVICE __host__ __device__
#else
#define O_VOXEL_HOST_DEVICE
#endif

namespace o_voxel {

constexpr std::int64_t kFreeSlot = -1;
constexpr std::int64_t kMaxVoxels = std::int64_t{1} << 30;  // keeps a row below 2^31, and so a slot apart from -1

// coords: (N, 4) int32 [batch, x, y, z], no row twice.  Returns the table.
at::Tensor voxel_table_cpu(const at::Tensor& coords);
at::Tensor voxel_table_cuda(const at::Tensor& coords);

// table: of coords. queries: (M, 4) int32, any values.  Returns (M,) int64: the row in coords, or -1.
at::Tensor voxel_rows_cpu(const at::Tensor& table, const at::Tensor& coords, const at::Tensor& queries);
at::Tensor voxel_rows_cuda(const at::Tensor& table, const at::Tensor& coords, const at::Tensor& queries);

// Slots for n voxels: a power of two, at least 2 n.
inline std::int64_t table_slots(std::int64_t n) {
  std::int64_t slots = 16;
  while (slots < 2 * n) {
    slots *= 2;
  }
  return slots;
}

// 64 well-mixed bits of a voxel: two rounds of a multiply-and-fold over its four words.
O_VOXEL_HOST_DEVICE inline std::uint64_t voxel_hash(std::int32_t b, std::int32_t x, std::int32_t y, std::int32_t z) {
  std::uint64_t h = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(b)) << 32) | static_cast<std::uint32_t>(x);
  h *= 0x9fb21c651e98df25ull;
  h ^= h >> 32;
  h += (static_cast<std::uint64_t>(static_cast<std::uint32_t>(y)) << 32) | static_cast<std::uint32_t>(z);
  h *= 0xd6e8feb86659fd93ull;
  h ^= h >> 32;
  h *= 0xd6e8feb86659fd93ull;
  return h ^ (h >> 32);
}

// What an occupied slot holds.
O_VOXEL_HOST_DEVICE inline std::int64_t slot_value(std::uint64_t hash, std::int64_t row) {
  return static_cast<std::int64_t>((hash & 0xffffffff00000000ull) | static_cast<std::uint64_t>(row));
}

// Whether a slot may hold the voxel with this hash.
O_VOXEL_HOST_DEVICE inline bool same_tag(std::int64_t slot, std::uint64_t hash) {
  return (static_cast<std::uint64_t>(slot) ^ hash) >> 32 == 0;
}

O_VOXEL_HOST_DEVICE inline std::int64_t slot_row(std::int64_t slot) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(slot) & 0xffffffffull);
}

}  // namespace o_voxel
