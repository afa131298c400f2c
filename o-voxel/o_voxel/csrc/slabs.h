// Slabs of voxels, the triangles in them, and where these cross the lines of the grid.
//
// A slab is all voxels of a few x.  Whatever touches it is handled in the order of the input, so that every sum of a
// voxel has one order, however many slabs and threads there are.  Positions on lines are rounded as in voxelize.py.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace o_voxel {

using Vec = std::array<double, 3>;
using VecF = std::array<float, 3>;
using Cell = std::array<std::int64_t, 3>;

struct VoxelGrid {
  VecF size;
  Cell shape;

  VoxelGrid(const float* voxel, const std::int64_t* voxels)
      : size{voxel[0], voxel[1], voxel[2]}, shape{voxels[0], voxels[1], voxels[2]} {}

  double far_side(std::int64_t cell, int axis) const { return static_cast<float>(cell + 1) * size[axis]; }

  std::int64_t cell(double position, int axis) const {
    return static_cast<std::int64_t>(std::clamp(position / size[axis], 0.0, static_cast<double>(shape[axis] - 1)));
  }
};

struct Slab {
  std::int64_t begin, end;  // of x

  bool holds(std::int64_t x) const { return x >= begin && x < end; }
};

// Rows of a slab's voxels by their place in it: open addressing, half empty.  Voxels of a block of 2^3 lie in one line
// of the cache, and what is asked for one after the other mostly lies in one block.
class SlabTable {
 public:
  // Forget everything and take another slab; the memory stays.
  void reset(Slab slab) {
    slab_ = slab;
    voxels_.clear();
    std::fill(entries_.begin(), entries_.end(), Entry{});
  }

  Cell cell(std::int64_t key) const {
    return {(key >> 2 * kBits) + slab_.begin, key >> kBits & kMask, key & kMask};
  }

  // The row of a voxel, a new one if it has none.
  std::int64_t insert(const Cell& voxel) {
    const std::int64_t wanted = key(voxel);
    Entry* place = find_place(wanted);
    if (place->key == wanted) {
      return place->row;
    }
    if (2 * (voxels_.size() + 1) > entries_.size()) {
      grow();
      place = find_place(wanted);
    }
    *place = {wanted, static_cast<std::int64_t>(voxels_.size())};
    voxels_.push_back(wanted);
    return place->row;
  }

  // The row of a voxel, or -1.
  std::int64_t find(const Cell& voxel) const {
    const std::int64_t wanted = key(voxel);
    const Entry* place = find_place(wanted);
    return place->key == wanted ? place->row : -1;
  }

  std::int64_t size() const { return static_cast<std::int64_t>(voxels_.size()); }

  // (voxel's key, row) in the order of the keys.
  std::vector<std::pair<std::int64_t, std::int64_t>> sorted() const {
    std::vector<std::pair<std::int64_t, std::int64_t>> order(voxels_.size());
    for (std::size_t row = 0; row < voxels_.size(); ++row) {
      order[row] = {voxels_[row], static_cast<std::int64_t>(row)};
    }
    std::sort(order.begin(), order.end());
    return order;
  }

 private:
  static constexpr std::int64_t kFree = -1;
  static constexpr int kBits = 21;  // grids have at most 2^20 voxels along an axis
  static constexpr std::int64_t kMask = (std::int64_t{1} << kBits) - 1;
  static constexpr std::int64_t kInBlock = std::int64_t{1} << 2 * kBits | std::int64_t{1} << kBits | 1;

  struct Entry {
    std::int64_t key = kFree, row = 0;
  };

  std::int64_t key(const Cell& c) const { return (c[0] - slab_.begin) << 2 * kBits | c[1] << kBits | c[2]; }

  Entry* find_place(std::int64_t wanted) { return const_cast<Entry*>(std::as_const(*this).find_place(wanted)); }

  const Entry* find_place(std::int64_t wanted) const {
    const std::size_t mask = entries_.size() - 1;
    const std::uint64_t hash = static_cast<std::uint64_t>(wanted & ~kInBlock) * 0x9fb21c651e98df25ull;
    const std::int64_t within = (wanted >> (2 * kBits - 2) & 4) | (wanted >> (kBits - 1) & 2) | (wanted & 1);
    std::size_t place = ((hash ^ (hash >> 32)) << 3 | static_cast<std::size_t>(within)) & mask;
    while (entries_[place].key != kFree && entries_[place].key != wanted) {
      place = (place + 1) & mask;
    }
    return &entries_[place];
  }

  void grow() {
    entries_.assign(2 * entries_.size(), Entry{});
    for (std::size_t row = 0; row < voxels_.size(); ++row) {
      *find_place(voxels_[row]) = {voxels_[row], static_cast<std::int64_t>(row)};
    }
  }

  Slab slab_{0, 0};
  std::vector<Entry> entries_ = std::vector<Entry>(1024);
  std::vector<std::int64_t> voxels_;
};

// The slabs of a grid, and which of some items (given by their bounds in x) touch each, in the order of the items.
class Slabs {
 public:
  static constexpr std::int64_t kWidth = 8;

  explicit Slabs(const VoxelGrid& grid) : grid_(grid), count_((grid.shape[0] + kWidth - 1) / kWidth) {}

  std::int64_t count() const { return count_; }

  Slab operator[](std::int64_t i) const { return {i * kWidth, std::min((i + 1) * kWidth, grid_.shape[0])}; }

  template <typename Bounds>
  std::vector<std::vector<std::int32_t>> members(std::int64_t items, Bounds bounds) const {
    std::vector<std::vector<std::int32_t>> result(count_);
    const double last = static_cast<double>(grid_.shape[0] - 1);
    for (std::int64_t item = 0; item < items; ++item) {
      const std::pair<float, float> x = bounds(item);
      // A cell more on both sides: an edge belongs to the voxels around it.
      const double low = std::floor(static_cast<double>(x.first) / grid_.size[0]) - 1;
      const double high = std::floor(static_cast<double>(x.second) / grid_.size[0]) + 1;
      if (high < 0 || low > last) {
        continue;
      }
      const auto first = static_cast<std::int64_t>(std::max(low, 0.0)) / kWidth;
      const auto end = static_cast<std::int64_t>(std::min(high, last)) / kWidth;
      for (std::int64_t slab = first; slab <= end; ++slab) {
        result[slab].push_back(static_cast<std::int32_t>(item));
      }
    }
    return result;
  }

  // Calls work(i, space) for every slab, from as many threads, each with a space of its own that keeps its memory.
  // The first error ends the work and is thrown here.
  template <typename Space, typename Work>
  void for_each(std::int64_t threads, Work work) const {
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex lock;
    const auto run = [&] {
      try {
        Space space;
        for (std::int64_t i = next++; i < count_; i = next++) {
          work(i, space);
        }
      } catch (...) {
        const std::lock_guard<std::mutex> guard(lock);
        error = std::current_exception();
        next = count_;
      }
    };
    std::vector<std::thread> others;
    try {
      for (std::int64_t i = 1; i < std::min(threads, count_); ++i) {
        others.emplace_back(run);
      }
    } catch (...) {  // the system has no more threads: fewer do it
    }
    run();
    for (std::thread& other : others) {
      other.join();
    }
    if (error) {
      std::rethrow_exception(error);
    }
  }

 private:
  const VoxelGrid& grid_;
  std::int64_t count_;
};

inline double mix(double a, double b, double at, double value_a, double value_b) {
  if (a == b) {
    return value_a;
  }
  const double share = (at - a) / (b - a);
  return (1 - share) * value_a + share * value_b;
}

// Calls visit(voxel whose far edge along axis is crossed, axis, point) for each crossing of a triangle with an inner
// line of the grid that some voxel of the slab has as an edge.
template <typename Visit>
void for_each_crossing(const float* triangle, const VoxelGrid& grid, Slab slab, Visit visit) {
  struct Corner {
    double x, y, z;
  };
  for (int axis = 0; axis < 3; ++axis) {
    const int u = (axis + 1) % 3, v = (axis + 2) % 3;
    std::array<Corner, 3> c;
    for (int i = 0; i < 3; ++i) {
      c[i] = {triangle[3 * i + u], triangle[3 * i + v], triangle[3 * i + axis]};
    }
    for (const auto& [first, second] : {std::pair{0, 1}, std::pair{1, 2}, std::pair{0, 1}}) {  // keeps equals in order
      if (c[second].y < c[first].y) {
        std::swap(c[first], c[second]);
      }
    }
    std::int64_t row = grid.cell(c[0].y, v), last_row = grid.cell(c[2].y, v);
    const std::int64_t turn = grid.cell(c[1].y, v);
    if (v == 0) {
      row = std::max(row, slab.begin - 1);
      last_row = std::min(last_row, slab.end);
    }
    for (; row < last_row; ++row) {
      const bool upper = row >= turn;
      const Corner& apex = upper ? c[2] : c[0];
      const Corner& foot = upper ? c[0] : c[2];
      const double y = grid.far_side(row, v);
      double x0 = mix(apex.y, c[1].y, y, apex.x, c[1].x), z0 = mix(apex.y, c[1].y, y, apex.z, c[1].z);
      double x1 = mix(apex.y, foot.y, y, apex.x, foot.x), z1 = mix(apex.y, foot.y, y, apex.z, foot.z);
      if (x0 > x1) {
        std::swap(x0, x1);
        std::swap(z0, z1);
      }
      std::int64_t column = grid.cell(x0, u), last_column = grid.cell(x1, u);
      if (u == 0) {
        column = std::max(column, slab.begin - 1);
        last_column = std::min(last_column, slab.end);
      } else if (axis == 0 && column < last_column) {
        // Only where the line is in the slab, and a cell more.
        const double low = (slab.begin - 1) * static_cast<double>(grid.size[0]);
        const double high = (slab.end + 1) * static_cast<double>(grid.size[0]);
        if (std::max(z0, z1) < low || std::min(z0, z1) > high) {
          continue;
        }
        if (std::abs(z1 - z0) > high - low) {
          double enter = mix(z0, z1, low, x0, x1), leave = mix(z0, z1, high, x0, x1);
          if (enter > leave) {
            std::swap(enter, leave);
          }
          column = std::max(column, grid.cell(enter, u) - 2);
          last_column = std::min(last_column, grid.cell(leave, u) + 2);
        }
      }
      for (; column < last_column; ++column) {
        const double x = grid.far_side(column, u);
        const double z = mix(x0, x1, x, z0, z1);
        const double depth = z / grid.size[axis];
        if (!(depth > -1 && depth < static_cast<double>(grid.shape[axis]))) {
          continue;
        }
        Cell voxel;
        Vec point;
        voxel[u] = column, voxel[v] = row, voxel[axis] = static_cast<std::int64_t>(depth);
        point[u] = x, point[v] = y, point[axis] = z;
        visit(voxel, axis, point);
      }
    }
  }
}

// Calls visit(voxel, whether it is the first) for those of the four voxels around an edge that are in the slab.
template <typename Visit>
void for_each_around(Cell voxel, int axis, Slab slab, Visit visit) {
  const int u = (axis + 1) % 3, v = (axis + 2) % 3;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      Cell other = voxel;
      other[u] += i;
      other[v] += j;
      if (slab.holds(other[0])) {
        visit(other, i == 0 && j == 0);
      }
    }
  }
}

inline float dot(const VecF& a, const VecF& b) { return a[0] * b[0] + (a[1] * b[1] + a[2] * b[2]); }

// Unit normal of a triangle, zero where it has no area.
inline VecF unit_normal(const float* t) {
  VecF a, b;
  for (int i = 0; i < 3; ++i) {
    a[i] = t[3 + i] - t[i];
    b[i] = t[6 + i] - t[3 + i];
  }
  VecF n{a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
  const float length = std::sqrt(dot(n, n));
  for (float& x : n) {
    x = length > 0 ? x / length : 0.0f;
  }
  return n;
}

inline std::pair<float, float> bounds_x(const float* t) {
  return {std::min({t[0], t[3], t[6]}), std::max({t[0], t[3], t[6]})};
}

}  // namespace o_voxel
