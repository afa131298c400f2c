#include "lookup.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

namespace o_voxel {

at::Tensor voxel_table_cpu(const at::Tensor& coords) {
  const std::int64_t n = coords.size(0);
  at::Tensor table = at::full({table_slots(n)}, kFreeSlot, coords.options().dtype(at::kLong));
  const std::int32_t* voxel = coords.const_data_ptr<std::int32_t>();
  std::int64_t* slots = table.mutable_data_ptr<std::int64_t>();
  const std::uint64_t mask = static_cast<std::uint64_t>(table.size(0)) - 1;
  for (std::int64_t row = 0; row < n; ++row, voxel += 4) {
    const std::uint64_t hash = voxel_hash(voxel[0], voxel[1], voxel[2], voxel[3]);
    std::uint64_t place = hash & mask;
    while (slots[place] != kFreeSlot) {  // ends: half of the slots stay free
      place = (place + 1) & mask;
    }
    slots[place] = slot_value(hash, row);
  }
  return table;
}

at::Tensor voxel_rows_cpu(const at::Tensor& table, const at::Tensor& coords, const at::Tensor& queries) {
  const std::int64_t m = queries.size(0);
  at::Tensor rows = at::empty({m}, table.options());
  const std::int32_t* voxels = coords.const_data_ptr<std::int32_t>();
  const std::int32_t* wanted = queries.const_data_ptr<std::int32_t>();
  const std::int64_t* slots = table.const_data_ptr<std::int64_t>();
  std::int64_t* out = rows.mutable_data_ptr<std::int64_t>();
  const std::uint64_t capacity = static_cast<std::uint64_t>(table.size(0));
  at::parallel_for(0, m, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t* q = wanted + 4 * i;
      const std::uint64_t hash = voxel_hash(q[0], q[1], q[2], q[3]);
      out[i] = -1;
      for (std::uint64_t probe = 0; probe < capacity; ++probe) {
        const std::int64_t slot = slots[(hash + probe) & (capacity - 1)];
        if (slot == kFreeSlot) {
          break;
        }
        if (same_tag(slot, hash)) {
          const std::int32_t* v = voxels + 4 * slot_row(slot);
          if (v[0] == q[0] && v[1] == q[1] && v[2] == q[2] && v[3] == q[3]) {
            out[i] = slot_row(slot);
            break;
          }
        }
      }
    }
  });
  return rows;
}

}  // namespace o_voxel
