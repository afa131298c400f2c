#include <optional>

#include "o_voxel.h"
#include "slabs.h"

namespace {

struct Part {
  std::vector<std::int32_t> coords;
  std::vector<std::uint8_t> values;
};

}  // namespace

struct OVoxelAttributes {
  std::vector<Part> parts;
};

namespace o_voxel {
namespace {

constexpr int kAttributes = 12, kFirstSigned = 9, kFactors = 11;
constexpr double kSlack = 1e-3;  // keeps whole numbers what they are, whatever the rounding of the mean
constexpr double kLeastWeight = 1e-3;
constexpr float kLeastArea = 1e-6f;
constexpr double kOpaque = 0, kMask = 1;
enum Wrap { kRepeat, kClamp, kMirror };
enum Slot { kBaseColor, kMetallic, kRoughness, kEmissive, kAlpha, kNormal, kSlots };

// The greatest whole number below; beyond the limit, texels cannot be told apart.
std::int64_t whole(double place) {
  const double limit = 1e15;
  place = std::clamp(place, -limit, limit);
  const auto at = static_cast<std::int64_t>(place);
  return at - (static_cast<double>(at) > place ? 1 : 0);
}

class Texture {
 public:
  Texture(const std::uint8_t* texels, const std::int64_t* layout)
      : texels_(texels), channels_(layout[0]), side_(layout[1]), linear_(layout[2] != 0), wrap_(layout[3]) {
    while ((side_ >> last_) > 1) {
      ++last_;
    }
  }

  bool is_like(const Texture& other) const {
    return side_ == other.side_ && linear_ == other.linear_ && wrap_ == other.wrap_;
  }

  friend class Sampler;

 private:
  std::int64_t wrap(double place, std::int64_t side) const {
    const std::int64_t at = whole(place);
    if (wrap_ == kClamp) {
      return std::clamp<std::int64_t>(at, 0, side - 1);
    }
    if (wrap_ == kMirror) {
      const std::int64_t within = at & (2 * side - 1);  // sides are powers of two
      return std::min(within, 2 * side - 1 - within);
    }
    return at & (side - 1);
  }

  const std::uint8_t* texels_;
  std::int64_t channels_, side_;
  int last_ = 0;
  bool linear_;
  std::int64_t wrap_;
};

// What the textures show at one point.  Those of one layout, mostly all, share the search for the texels.
class Sampler {
 public:
  // log_footprint: of how much of a texture's side one sample covers.
  Sampler(double u, double v, double log_footprint, double offset)
      : u_(u), v_(v), level_(log_footprint + offset) {}

  void operator()(const Texture& texture, double* out) {
    if (like_ == nullptr || !like_->is_like(texture)) {
      like_ = &texture;
      seek(texture);
    }
    for (std::int64_t c = 0; c < texture.channels_; ++c) {
      double value = finer_.mix(texture.texels_ + c, texture.channels_);
      if (share_ > 0) {
        value = (1 - share_) * value + share_ * coarser_.mix(texture.texels_ + c, texture.channels_);
      }
      out[c] = value / 255;
    }
  }

 private:
  // Four texels and how far the point is from the first of them, to the right and down.
  struct Corners {
    std::array<std::int64_t, 4> at{};
    double right = 0, down = 0;

    double mix(const std::uint8_t* texels, std::int64_t stride) const {
      const double top = (1 - right) * texels[at[0] * stride] + right * texels[at[1] * stride];
      const double bottom = (1 - right) * texels[at[2] * stride] + right * texels[at[3] * stride];
      return (1 - down) * top + down * bottom;
    }
  };

  void seek(const Texture& t) {
    share_ = 0;
    if (!t.linear_) {
      finer_ = {};
      finer_.at.fill(t.wrap((1 - v_) * t.side_, t.side_) * t.side_ + t.wrap(u_ * t.side_, t.side_));
      return;
    }
    double level = level_ + t.last_;
    level = std::isfinite(level) ? std::clamp(level, 0.0, static_cast<double>(t.last_)) : 0.0;
    const int lower = static_cast<int>(level);
    share_ = level - lower;
    finer_ = corners(t, lower);
    if (share_ > 0) {
      coarser_ = corners(t, lower + 1);
    }
  }

  Corners corners(const Texture& t, int level) const {
    const std::int64_t side = t.side_ >> level;
    const std::int64_t begin = (t.side_ * t.side_ - side * side) * 4 / 3;
    const double x = u_ * side - 0.5, y = (1 - v_) * side - 0.5;
    const auto x0 = static_cast<double>(whole(x)), y0 = static_cast<double>(whole(y));
    const std::int64_t left = t.wrap(x0, side), right = t.wrap(x0 + 1, side);
    const std::int64_t top = begin + t.wrap(y0, side) * side, bottom = begin + t.wrap(y0 + 1, side) * side;
    return {{top + left, top + right, bottom + left, bottom + right},
            std::clamp(x - x0, 0.0, 1.0),
            std::clamp(y - y0, 0.0, 1.0)};
  }

  double u_, v_, level_, share_ = 0;
  const Texture* like_ = nullptr;
  Corners finer_, coarser_;
};

struct Material {
  const double* factors;
  std::array<std::optional<Texture>, kSlots> textures;
};

// What all voxels of a triangle have in common.
struct Triangle {
  const float *places, *normals, *uvs, *colors;
  VecF normal;
  Vec ab, ac, tangent{1, 0, 0}, bitangent{0, 1, 0};
  double d00 = 0, d01 = 0, d11 = 0, area, log_footprint = -INFINITY;

  Triangle(const float* p, const float* n, const float* uv, const float* color, float largest_side)
      : places(p), normals(n), uvs(uv), colors(color), normal(unit_normal(p)) {
    VecF e1, e2;
    for (int i = 0; i < 3; ++i) {
      e1[i] = p[3 + i] - p[i];
      e2[i] = p[6 + i] - p[i];
      ab[i] = static_cast<double>(p[3 + i]) - p[i];
      ac[i] = static_cast<double>(p[6 + i]) - p[i];
      d00 += ab[i] * ab[i];
      d01 += ab[i] * ac[i];
      d11 += ac[i] * ac[i];
    }
    area = d00 * d11 - d01 * d01;
    const float du1 = uv[2] - uv[0], dv1 = uv[3] - uv[1], du2 = uv[4] - uv[0], dv2 = uv[5] - uv[1];
    const float uv_area = du1 * dv2 - dv1 * du2;
    if (!(std::abs(uv_area) < kLeastArea)) {
      VecF t, b;
      for (int i = 0; i < 3; ++i) {
        t[i] = dv2 * e1[i] - dv1 * e2[i];
        b[i] = du1 * e2[i] - du2 * e1[i];
      }
      const float t_length = std::sqrt(dot(t, t)), b_length = std::sqrt(dot(b, b));
      for (int i = 0; i < 3; ++i) {
        tangent[i] = t[i] / t_length;
        bitangent[i] = b[i] / b_length;
      }
      log_footprint = std::log2(largest_side / std::sqrt(t_length / uv_area * (b_length / uv_area)));
    }
  }
};

// The attributes of a triangle at a voxel's centre; returns their weight.
double evaluate(const Triangle& t, const Material& material, const Vec& centre, double offset, double* out) {
  Vec ap;
  double height = 0, d20 = 0, d21 = 0;
  for (int i = 0; i < 3; ++i) {
    ap[i] = centre[i] - t.places[i];
    height += ap[i] * t.normal[i];
    d20 += ap[i] * t.ab[i];
    d21 += ap[i] * t.ac[i];
  }
  Vec share{1, 0, 0};
  if (t.area > 0) {
    share[1] = (t.d11 * d20 - t.d01 * d21) / t.area;
    share[2] = (t.d00 * d21 - t.d01 * d20) / t.area;
    share[0] = 1 - share[1] - share[2];
  }
  double uv[2], color[4], normal[3];
  for (int i = 0; i < 2; ++i) {
    uv[i] = share[0] * t.uvs[i] + share[1] * t.uvs[2 + i] + share[2] * t.uvs[4 + i];
  }
  for (int i = 0; i < 3; ++i) {
    normal[i] = share[0] * t.normals[i] + share[1] * t.normals[3 + i] + share[2] * t.normals[6 + i];
  }
  for (int i = 0; i < 4; ++i) {
    color[i] = std::clamp(share[0] * t.colors[i] + share[1] * t.colors[4 + i] + share[2] * t.colors[8 + i], 0.0, 1.0);
  }
  Sampler sampler(uv[0], uv[1], t.log_footprint, offset);
  const auto sample = [&](Slot slot, double* value, int channels) {
    std::fill(value, value + channels, 1.0);
    if (material.textures[slot]) {
      sampler(*material.textures[slot], value);
    }
  };
  const double* f = material.factors;
  sample(kBaseColor, out, 3);
  sample(kMetallic, out + 3, 1);
  sample(kRoughness, out + 4, 1);
  sample(kEmissive, out + 5, 3);
  for (int i = 0; i < 3; ++i) {
    out[i] *= f[i] * color[i];
    out[5 + i] *= f[5 + i];
  }
  out[3] *= f[3];
  out[4] *= f[4];
  out[8] = 1;
  if (f[9] != kOpaque) {
    sample(kAlpha, out + 8, 1);
    out[8] *= f[8] * color[3];
    if (f[9] == kMask) {
      out[8] = out[8] >= f[10] ? 1 : 0;
    }
  }
  if (material.textures[kNormal]) {
    double mapped[3];
    sample(kNormal, mapped, 3);
    double length = 0;
    for (int i = 0; i < 3; ++i) {
      normal[i] = (2 * mapped[0] - 1) * t.tangent[i] + (2 * mapped[1] - 1) * t.bitangent[i] +
                  (2 * mapped[2] - 1) * normal[i];
      length += normal[i] * normal[i];
    }
    length = std::max(std::sqrt(length), 1e-12);
    for (double& x : normal) {
      x /= length;
    }
  }
  std::copy(normal, normal + 3, out + 9);
  return std::max(1 - height, kLeastWeight);
}

struct Mean {
  std::array<double, kAttributes> sum{};
  double weight = 0;
  std::int32_t last = -1;  // the triangle that came last
};

std::vector<Part> attributes(const float* p, const float* n, const float* uv, const float* color,
                             const std::int64_t* material_of, std::int64_t face_count,
                             const std::vector<Material>& materials, const VoxelGrid& grid, double mip_level_offset,
                             std::int64_t threads) {
  const float largest_side = std::max({grid.size[0], grid.size[1], grid.size[2]});
  const Slabs slabs(grid);
  const auto of_slab = slabs.members(face_count, [&](std::int64_t i) { return bounds_x(p + 9 * i); });

  std::vector<Part> parts(slabs.count());
  struct Space {
    SlabTable table;
    std::vector<Mean> means;
  };
  slabs.for_each<Space>(threads, [&](std::int64_t index, Space& space) {
    const Slab slab = slabs[index];
    SlabTable& table = space.table;
    std::vector<Mean>& means = space.means;
    table.reset(slab);
    means.clear();
    for (const std::int32_t i : of_slab[index]) {
      const std::int64_t f = i;
      const Triangle triangle(p + 9 * f, n + 9 * f, uv + 6 * f, color + 12 * f, largest_side);
      const Material& look = materials[material_of[f]];
      for_each_crossing(triangle.places, grid, slab, [&](const Cell& voxel, int axis, const Vec&) {
        for_each_around(voxel, axis, slab, [&](const Cell& around, bool) {
          const std::int64_t row = table.insert(around);
          if (row == static_cast<std::int64_t>(means.size())) {
            means.emplace_back();
          }
          Mean& mean = means[row];
          if (mean.last == i) {
            return;
          }
          mean.last = i;
          Vec centre;
          for (int k = 0; k < 3; ++k) {
            centre[k] = (around[k] + 0.5) * grid.size[k];
          }
          double values[kAttributes];
          const double weight = evaluate(triangle, look, centre, mip_level_offset, values);
          mean.weight += weight;
          for (int k = 0; k < kAttributes; ++k) {
            mean.sum[k] += weight * values[k];
          }
        });
      });
    }
    Part& part = parts[index];
    part.coords.reserve(3 * table.size());
    part.values.reserve(kAttributes * table.size());
    for (const auto& [key, row] : table.sorted()) {
      const Cell voxel = table.cell(key);
      part.coords.insert(part.coords.end(), voxel.begin(), voxel.end());
      for (int k = 0; k < kAttributes; ++k) {
        const double value = means[row].sum[k] / means[row].weight;
        const double scaled = (k < kFirstSigned ? value : value * 0.5 + 0.5) * 255 + kSlack;
        part.values.push_back(static_cast<std::uint8_t>(scaled > 0 ? std::min(scaled, 255.0) : 0.0));
      }
    }
  });
  return parts;
}

}  // namespace
}  // namespace o_voxel

OVoxelAttributes* o_voxel_attributes(const float* corners, const float* normals, const float* uvs, const float* colors,
                                     const std::int64_t* material, std::int64_t face_count, const double* factors,
                                     const std::uint8_t* const* textures, const std::int64_t* layout,
                                     std::int64_t material_count, const float* size, const std::int64_t* shape,
                                     double mip_level_offset, std::int64_t threads, std::int64_t* count) {
  try {
    std::vector<o_voxel::Material> materials(material_count);
    for (std::int64_t m = 0; m < material_count; ++m) {
      materials[m].factors = factors + o_voxel::kFactors * m;
      for (std::int64_t slot = 0; slot < o_voxel::kSlots; ++slot) {
        const std::int64_t i = o_voxel::kSlots * m + slot;
        if (textures[i] != nullptr) {
          materials[m].textures[slot].emplace(textures[i], layout + 4 * i);
        }
      }
    }
    auto* result = new OVoxelAttributes{o_voxel::attributes(corners, normals, uvs, colors, material, face_count,
                                                            materials, o_voxel::VoxelGrid(size, shape),
                                                            mip_level_offset, threads)};
    *count = 0;
    for (const Part& part : result->parts) {
      *count += static_cast<std::int64_t>(part.coords.size()) / 3;
    }
    return result;
  } catch (const std::exception&) {
    return nullptr;
  }
}

void o_voxel_attributes_copy(const OVoxelAttributes* result, std::int32_t* coords, std::uint8_t* values) {
  for (const Part& part : result->parts) {
    coords = std::copy(part.coords.begin(), part.coords.end(), coords);
    values = std::copy(part.values.begin(), part.values.end(), values);
  }
}

void o_voxel_attributes_free(OVoxelAttributes* result) { delete result; }
