#include <limits>

#include "o_voxel.h"
#include "slabs.h"

namespace {

struct Part {
  std::vector<std::int32_t> coords;
  std::vector<float> vertices;
  std::vector<char> flags;
};

}  // namespace

struct OVoxelSides {
  std::vector<std::int64_t> sides;
};

struct OVoxelGrid {
  std::vector<Part> parts;
};

namespace o_voxel {
namespace {

// What a voxel has gathered: the upper triangle of its matrix, its target, the sum and count of crossing points.
struct Gathered {
  std::array<double, 6> matrix{};
  Vec target{}, points{};
  double count = 0;
  std::array<bool, 3> crossed{};
};

struct Terms {
  std::array<double, 6> matrix;
  Vec target;

  void add_to(Gathered& to, double weight) const {
    for (int i = 0; i < 6; ++i) {
      to.matrix[i] += weight * matrix[i];
    }
    for (int i = 0; i < 3; ++i) {
      to.target[i] += weight * target[i];
    }
  }
};

Terms plane_terms(const VecF& normal, const float* point) {
  const double x = normal[0], y = normal[1], z = normal[2];
  const double height = x * point[0] + y * point[1] + z * point[2];
  return {{x * x, x * y, x * z, y * y, y * z, z * z}, {x * height, y * height, z * height}};
}

Terms line_terms(const Vec& d, const float* point) {
  const double along = d[0] * point[0] + d[1] * point[1] + d[2] * point[2];
  return {{1 - d[0] * d[0], -d[0] * d[1], -d[0] * d[2], 1 - d[1] * d[1], -d[1] * d[2], 1 - d[2] * d[2]},
          {point[0] - d[0] * along, point[1] - d[1] * along, point[2] - d[2] * along}};
}

// The separating-axis test of a triangle and the voxels of a grid, in float32.
class Overlap {
 public:
  Overlap(const float* t, const VecF& normal, const VecF& size) : normal_(normal) {
    VecF far, near;
    for (int i = 0; i < 3; ++i) {
      far[i] = normal[i] > 0 ? size[i] : 0.0f;
      near[i] = size[i] - far[i] - t[i];
      far[i] = far[i] - t[i];
    }
    far_ = dot(normal, far);
    near_ = dot(normal, near);
    for (int view = 0; view < 3; ++view) {
      const int f = view, s = (view + 1) % 3, axis = (view + 2) % 3;
      const float sign = normal[axis] < 0 ? -1.0f : 1.0f;
      for (int i = 0; i < 3; ++i) {
        const float *a = t + 3 * i, *b = t + 3 * ((i + 1) % 3);
        const float x = -sign * (b[s] - a[s]), y = sign * (b[f] - a[f]);
        sides_[3 * view + i] = {
            x, y, -(x * a[f] + y * a[s]) + (std::max(x, 0.0f) * size[f] + std::max(y, 0.0f) * size[s])};
      }
    }
  }

  bool operator()(const VecF& origin) const {
    const float at = dot(normal_, origin);
    if ((at + far_) * (at + near_) > 0) {
      return false;
    }
    for (int view = 0; view < 3; ++view) {
      const float x = origin[view], y = origin[(view + 1) % 3];
      for (int i = 0; i < 3; ++i) {
        const VecF& side = sides_[3 * view + i];
        if (!(side[0] * x + side[1] * y + side[2] >= 0)) {
          return false;
        }
      }
    }
    return true;
  }

 private:
  VecF normal_;
  float far_, near_;
  std::array<VecF, 9> sides_;
};

// Calls visit(row) for the voxels of the table that a triangle touches.
template <typename Visit>
void for_each_touched(const float* t, const VecF& normal, const VoxelGrid& grid, Slab slab, const SlabTable& table,
                      Visit visit) {
  int axis = 0;
  for (int i = 1; i < 3; ++i) {
    if (std::abs(normal[i]) > std::abs(normal[axis])) {
      axis = i;
    }
  }
  if (normal[axis] == 0) {
    return;
  }
  Cell low, high;
  for (int i = 0; i < 3; ++i) {
    const float limit = static_cast<float>(grid.shape[i]);
    const float least = std::min({t[i], t[3 + i], t[6 + i]}), most = std::max({t[i], t[3 + i], t[6 + i]});
    low[i] = static_cast<std::int64_t>(std::clamp(least / grid.size[i], 0.0f, limit));
    high[i] = static_cast<std::int64_t>(std::clamp(most / grid.size[i] + 1, 0.0f, limit));
  }
  low[0] = std::max(low[0], slab.begin);
  high[0] = std::min(high[0], slab.end);
  const int u = (axis + 1) % 3, v = (axis + 2) % 3;
  const Overlap overlaps(t, normal, grid.size);
  // The plane's depth over a column, a cell wider on both sides; the test itself decides.
  const double nu = normal[u] / static_cast<double>(normal[axis]), nv = normal[v] / static_cast<double>(normal[axis]);
  const double slope_u = -nu * grid.size[u], slope_v = -nv * grid.size[v];
  const double below = std::min(slope_u, 0.0) + std::min(slope_v, 0.0);
  const double above = std::max(slope_u, 0.0) + std::max(slope_v, 0.0);
  Cell c;
  VecF origin;
  for (c[u] = low[u]; c[u] < high[u]; ++c[u]) {
    origin[u] = static_cast<float>(c[u]) * grid.size[u];
    for (c[v] = low[v]; c[v] < high[v]; ++c[v]) {
      origin[v] = static_cast<float>(c[v]) * grid.size[v];
      const double at = t[axis] - nu * (c[u] * static_cast<double>(grid.size[u]) - t[u]) -
                        nv * (c[v] * static_cast<double>(grid.size[v]) - t[v]);
      const double first = (at + below) / grid.size[axis] - 1;
      const double last = (at + above) / grid.size[axis] + 2;
      const auto begin = static_cast<std::int64_t>(std::max(first, static_cast<double>(low[axis])));
      const auto end = static_cast<std::int64_t>(std::min(last, static_cast<double>(high[axis])));
      for (c[axis] = begin; c[axis] < end; ++c[axis]) {
        origin[axis] = static_cast<float>(c[axis]) * grid.size[axis];
        if (overlaps(origin)) {
          const std::int64_t row = table.find(c);
          if (row >= 0) {
            visit(row);
          }
        }
      }
    }
  }
}

// Calls visit(row) for the voxels of the table that a segment passes through.
template <typename Visit>
void for_each_passed(const float* start, const Vec& direction, double length, const VoxelGrid& grid, Slab slab,
                     const SlabTable& table, Visit visit) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  Cell voxel, step;
  Vec reach, stride;
  double enter = -kNever, leave = kNever;
  for (int i = 0; i < 3; ++i) {
    voxel[i] = static_cast<std::int64_t>(std::floor(start[i] / grid.size[i]));
    step[i] = direction[i] > 0 ? 1 : -1;
    const float side = grid.size[i] * static_cast<float>(voxel[i] + (step[i] > 0 ? 1 : 0));
    reach[i] = direction[i] == 0 ? kNever : static_cast<double>(side - start[i]) / direction[i];
    stride[i] = direction[i] == 0 ? kNever : grid.size[i] / std::abs(direction[i]);
    if (direction[i] != 0) {
      const double margin = grid.size[i];
      const double low = (-margin - start[i]) / direction[i];
      const double high = (grid.far_side(grid.shape[i] - 1, i) + margin - start[i]) / direction[i];
      enter = std::max(enter, std::min(low, high));
      leave = std::min(leave, std::max(low, high));
    }
  }
  length = std::min(length, leave);
  for (int i = 0; i < 3; ++i) {  // straight to where it enters the grid
    if (direction[i] != 0 && enter > reach[i]) {
      const double skipped = std::ceil((enter - reach[i]) / stride[i]);
      voxel[i] += step[i] * static_cast<std::int64_t>(skipped);
      reach[i] += skipped * stride[i];
    }
  }
  while (true) {
    if (slab.holds(voxel[0]) && voxel[1] >= 0 && voxel[1] < grid.shape[1] && voxel[2] >= 0 &&
        voxel[2] < grid.shape[2]) {
      const std::int64_t row = table.find(voxel);
      if (row >= 0) {
        visit(row);
      }
    }
    // The nearest side, of equals the last.
    const int axis = reach[0] < reach[1] ? (reach[0] < reach[2] ? 0 : 2) : (reach[1] < reach[2] ? 1 : 2);
    if (!(reach[axis] <= length)) {
      return;
    }
    voxel[axis] += step[axis];
    reach[axis] += stride[axis];
  }
}

using Symmetric = std::array<Vec, 3>;

// The minimum of x'Ax - 2 b'x without bounds; A is positive definite.
Vec solve(const Symmetric& a, const Vec& b) {
  const double r1 = a[0][1] / a[0][0], r2 = a[0][2] / a[0][0];
  const double yy = a[1][1] - r1 * a[0][1], yz = a[1][2] - r1 * a[0][2], zz = a[2][2] - r2 * a[0][2];
  const double by = b[1] - r1 * b[0], bz = b[2] - r2 * b[0], r3 = yz / yy;
  Vec x;
  x[2] = (bz - r3 * by) / (zz - r3 * yz);
  x[1] = (by - yz * x[2]) / yy;
  x[0] = (b[0] - a[0][1] * x[1] - a[0][2] * x[2]) / a[0][0];
  return x;
}

bool within(const Vec& x, const Vec& size) {
  return x[0] >= 0 && x[0] <= size[0] && x[1] >= 0 && x[1] <= size[1] && x[2] >= 0 && x[2] <= size[2];
}

// The same in the box [0, size]: the least of the minima of its faces, edges and corners if the free one is outside.
Vec minimise(const Symmetric& a, const Vec& b, const Vec& size) {
  Vec best = solve(a, b);
  if (within(best, size)) {
    return best;
  }
  double least = std::numeric_limits<double>::infinity();
  const auto offer = [&](const Vec& x) {
    if (within(x, size)) {
      double error = 0;
      for (int i = 0; i < 3; ++i) {
        error += x[i] * (a[i][0] * x[0] + a[i][1] * x[1] + a[i][2] * x[2] - 2 * b[i]);
      }
      if (error < least) {
        least = error;
        best = x;
      }
    }
  };
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    const double ratio = a[j][k] / a[j][j], rest = a[k][k] - ratio * a[j][k];
    for (const double at_i : {0.0, size[i]}) {
      const double bj = b[j] - a[i][j] * at_i, bk = b[k] - a[i][k] * at_i;
      Vec x;
      x[i] = at_i;
      x[k] = (bk - ratio * bj) / rest;
      x[j] = (bj - a[j][k] * x[k]) / a[j][j];
      offer(x);
      for (const double at_j : {0.0, size[j]}) {
        x[j] = at_j;
        x[k] = (bk - a[j][k] * at_j) / a[k][k];
        offer(x);
        if (i == 0) {
          for (const double at_k : {0.0, size[k]}) {
            x[k] = at_k;
            offer(x);
          }
        }
      }
    }
  }
  return best;
}

std::vector<std::int64_t> open_sides(const std::int64_t* f, std::int64_t sides) {
  const auto ends = [&](std::int64_t side) { return std::minmax(f[side], f[side % 3 == 2 ? side - 2 : side + 1]); };
  const std::int64_t vertices = sides == 0 ? 0 : *std::max_element(f, f + sides) + 1;
  // Sides by their lower vertex, then within the few of one vertex by the higher.
  std::vector<std::int64_t> begin(vertices + 1, 0);
  for (std::int64_t side = 0; side < sides; ++side) {
    ++begin[ends(side).first + 1];
  }
  for (std::int64_t i = 0; i < vertices; ++i) {
    begin[i + 1] += begin[i];
  }
  std::vector<std::pair<std::int64_t, std::int64_t>> of_vertex(sides);
  std::vector<std::int64_t> next(begin.begin(), begin.end() - 1);
  for (std::int64_t side = 0; side < sides; ++side) {
    const auto [low, high] = ends(side);
    of_vertex[next[low]++] = {high, side};
  }
  std::vector<std::int64_t> open;
  for (std::int64_t i = 0; i < vertices; ++i) {
    std::sort(of_vertex.begin() + begin[i], of_vertex.begin() + begin[i + 1]);
    for (std::int64_t k = begin[i]; k < begin[i + 1]; ++k) {
      const bool as_before = k > begin[i] && of_vertex[k - 1].first == of_vertex[k].first;
      const bool as_after = k + 1 < begin[i + 1] && of_vertex[k + 1].first == of_vertex[k].first;
      if (!as_before && !as_after) {
        open.push_back(of_vertex[k].second);
      }
    }
  }
  return open;
}

std::vector<Part> dual_grid(const float* t, std::int64_t face_count, const float* start, const float* end,
                            std::int64_t border_count, const VoxelGrid& grid, double face_weight,
                            double boundary_weight, double regularization, std::int64_t threads) {
  const Vec extent{grid.size[0], grid.size[1], grid.size[2]};
  const Slabs slabs(grid);
  const auto of_slab = slabs.members(face_count, [&](std::int64_t i) { return bounds_x(t + 9 * i); });
  const auto open_of_slab = slabs.members(border_count, [&](std::int64_t i) {
    return std::minmax(start[3 * i], end[3 * i]);
  });

  std::vector<Part> parts(slabs.count());
  struct Space {
    SlabTable table;
    std::vector<Gathered> gathered;
  };
  slabs.for_each<Space>(threads, [&](std::int64_t index, Space& space) {
    const Slab slab = slabs[index];
    SlabTable& table = space.table;
    std::vector<Gathered>& gathered = space.gathered;
    table.reset(slab);
    gathered.clear();
    for (const std::int32_t i : of_slab[index]) {
      const float* triangle = t + 9 * static_cast<std::int64_t>(i);
      const Terms plane = plane_terms(unit_normal(triangle), triangle);
      for_each_crossing(triangle, grid, slab, [&](const Cell& voxel, int axis, const Vec& point) {
        for_each_around(voxel, axis, slab, [&](const Cell& around, bool first) {
          const std::int64_t row = table.insert(around);
          if (row == static_cast<std::int64_t>(gathered.size())) {
            gathered.emplace_back();
          }
          Gathered& to = gathered[row];
          plane.add_to(to, 1);
          for (int k = 0; k < 3; ++k) {
            to.points[k] += point[k];
          }
          to.count += 1;
          to.crossed[axis] |= first;
        });
      });
    }
    if (face_weight > 0) {
      for (const std::int32_t i : of_slab[index]) {
        const float* triangle = t + 9 * static_cast<std::int64_t>(i);
        const VecF normal = unit_normal(triangle);
        const Terms plane = plane_terms(normal, triangle);
        for_each_touched(triangle, normal, grid, slab, table,
                         [&](std::int64_t row) { plane.add_to(gathered[row], face_weight); });
      }
    }
    for (const std::int32_t i : open_of_slab[index]) {
      const float *a = start + 3 * static_cast<std::int64_t>(i), *b = end + 3 * static_cast<std::int64_t>(i);
      Vec along{b[0] - a[0], b[1] - a[1], b[2] - a[2]};
      const double length = std::sqrt(along[0] * along[0] + along[1] * along[1] + along[2] * along[2]);
      for (double& x : along) {
        x /= length;
      }
      const Terms line = line_terms(along, a);
      for_each_passed(a, along, length, grid, slab, table,
                      [&](std::int64_t row) { line.add_to(gathered[row], boundary_weight); });
    }

    Part& part = parts[index];
    part.coords.reserve(3 * table.size());
    part.vertices.reserve(3 * table.size());
    part.flags.reserve(3 * table.size());
    for (const auto& [key, row] : table.sorted()) {
      const Gathered& g = gathered[row];
      const Cell voxel = table.cell(key);
      const auto& m = g.matrix;
      Symmetric a{Vec{m[0], m[1], m[2]}, Vec{m[1], m[3], m[4]}, Vec{m[2], m[4], m[5]}};
      Vec corner, b;
      for (int k = 0; k < 3; ++k) {
        a[k][k] += regularization * g.count;
        corner[k] = voxel[k] * extent[k];
      }
      for (int k = 0; k < 3; ++k) {  // from the voxel's own corner, which keeps all digits
        b[k] = g.target[k] + regularization * g.points[k] -
               (a[k][0] * corner[0] + a[k][1] * corner[1] + a[k][2] * corner[2]);
      }
      const Vec x = minimise(a, b, extent);
      for (int k = 0; k < 3; ++k) {
        part.coords.push_back(static_cast<std::int32_t>(voxel[k]));
        part.vertices.push_back(static_cast<float>(corner[k] + x[k]));
        part.flags.push_back(g.crossed[k]);
      }
    }
  });
  return parts;
}

}  // namespace
}  // namespace o_voxel

std::int64_t o_voxel_interface() { return 1; }

OVoxelSides* o_voxel_open_sides(const std::int64_t* faces, std::int64_t face_count, std::int64_t* count) {
  try {
    auto* result = new OVoxelSides{o_voxel::open_sides(faces, 3 * face_count)};
    *count = static_cast<std::int64_t>(result->sides.size());
    return result;
  } catch (const std::exception&) {
    return nullptr;
  }
}

void o_voxel_open_sides_copy(const OVoxelSides* result, std::int64_t* sides) {
  std::copy(result->sides.begin(), result->sides.end(), sides);
}

void o_voxel_open_sides_free(OVoxelSides* result) { delete result; }

OVoxelGrid* o_voxel_dual_grid(const float* corners, std::int64_t face_count, const float* open_start,
                              const float* open_end, std::int64_t border_count, const float* size,
                              const std::int64_t* shape, double face_weight, double boundary_weight,
                              double regularization, std::int64_t threads, std::int64_t* count) {
  try {
    auto* result = new OVoxelGrid{o_voxel::dual_grid(corners, face_count, open_start, open_end, border_count,
                                                     o_voxel::VoxelGrid(size, shape), face_weight, boundary_weight,
                                                     regularization, threads)};
    *count = 0;
    for (const Part& part : result->parts) {
      *count += static_cast<std::int64_t>(part.coords.size()) / 3;
    }
    return result;
  } catch (const std::exception&) {
    return nullptr;
  }
}

void o_voxel_dual_grid_copy(const OVoxelGrid* result, std::int32_t* coords, float* vertices, bool* flags) {
  for (const Part& part : result->parts) {
    coords = std::copy(part.coords.begin(), part.coords.end(), coords);
    vertices = std::copy(part.vertices.begin(), part.vertices.end(), vertices);
    flags = std::transform(part.flags.begin(), part.flags.end(), flags, [](char flag) { return flag != 0; });
  }
}

void o_voxel_dual_grid_free(OVoxelGrid* result) { delete result; }
