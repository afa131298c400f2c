// Meshes to voxels, on a CPU.  The torch functions of voxelize.py and attributes.py say what is computed; these bodies
// compute the same, slab by slab of voxels, so that threads share nothing and the result does not depend on them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace o_voxel {

// faces: (F, 3) int64, none negative.  Returns (B,) int64: those of the 3 F sides that no other triangle has, in the
// order of their lower and higher vertex.
at::Tensor open_sides(const at::Tensor& faces);

// corners: (F, 3, 3) float32 from the grid's first corner. open_start, open_end: (B, 3) float32, ends of open borders.
// size: of a voxel. shape: of the grid.  Returns coords (N, 3) int32, vertices (N, 3) float32, flags (N, 3) bool.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dual_grid(const at::Tensor& corners, const at::Tensor& open_start,
                                                         const at::Tensor& open_end, const std::vector<double>& size,
                                                         const std::vector<std::int64_t>& shape, double face_weight,
                                                         double boundary_weight, double regularization);

// corners, normals: (F, 3, 3), uvs: (F, 3, 2), colors: (F, 3, 4) float32. material: (F,) int64.
// factors: (M, 11) float64: base colour, metallic, roughness, emissive, alpha, alpha mode, cutoff.
// textures: six per material (base colour, metallic, roughness, emissive, alpha, normal), (T, C) uint8, empty for none.
// layout: (6 M, 3) int64: side, whether linear, wrap.  Returns coords (N, 3) int32, attributes (N, 12) uint8.
std::tuple<at::Tensor, at::Tensor> attributes(const at::Tensor& corners, const at::Tensor& normals,
                                              const at::Tensor& uvs, const at::Tensor& colors,
                                              const at::Tensor& material, const at::Tensor& factors,
                                              const std::vector<at::Tensor>& textures, const at::Tensor& layout,
                                              const std::vector<double>& size, const std::vector<std::int64_t>& shape,
                                              double mip_level_offset);

}  // namespace o_voxel
