// Meshes to voxels, on a CPU.  The torch functions of voxelize.py and attributes.py say what is computed; these bodies
// compute the same, slab by slab of voxels, so that threads share nothing and the result does not depend on them.
//
// Plain C, so that one library serves every Python and every torch.  All arrays are contiguous.  A function that
// computes returns a result, to be copied and then freed, or null where memory ran out.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define O_VOXEL_API extern "C" __declspec(dllexport)
#else
#define O_VOXEL_API extern "C" __attribute__((visibility("default")))
#endif

struct OVoxelSides;
struct OVoxelGrid;
struct OVoxelAttributes;

// Changes with every declaration below: _native.py refuses a library of another one.
O_VOXEL_API std::int64_t o_voxel_interface();

// faces: (F, 3), none negative.  Those of the 3 F sides that no other triangle has, in the order of their lower and
// higher vertex: (count) int64.
O_VOXEL_API OVoxelSides* o_voxel_open_sides(const std::int64_t* faces, std::int64_t face_count, std::int64_t* count);
O_VOXEL_API void o_voxel_open_sides_copy(const OVoxelSides* result, std::int64_t* sides);
O_VOXEL_API void o_voxel_open_sides_free(OVoxelSides* result);

// corners: (F, 3, 3) from the grid's first corner. open_start, open_end: (B, 3), ends of open borders.
// size: (3) of a voxel. shape: (3) of the grid.  Copies to coords, vertices and flags, each (count, 3).
O_VOXEL_API OVoxelGrid* o_voxel_dual_grid(const float* corners, std::int64_t face_count, const float* open_start,
                                          const float* open_end, std::int64_t border_count, const float* size,
                                          const std::int64_t* shape, double face_weight, double boundary_weight,
                                          double regularization, std::int64_t threads, std::int64_t* count);
O_VOXEL_API void o_voxel_dual_grid_copy(const OVoxelGrid* result, std::int32_t* coords, float* vertices, bool* flags);
O_VOXEL_API void o_voxel_dual_grid_free(OVoxelGrid* result);

// corners, normals: (F, 3, 3). uvs: (F, 3, 2). colors: (F, 3, 4). material: (F).
// factors: (M, 11): base colour, metallic, roughness, emissive, alpha, alpha mode, cutoff.
// textures: (M, 6): base colour, metallic, roughness, emissive, alpha, normal; texels (T, C), null for none.
// layout: (M, 6, 4): channels, side, whether linear, wrap.  Copies to coords (count, 3) and values (count, 12).
O_VOXEL_API OVoxelAttributes* o_voxel_attributes(const float* corners, const float* normals, const float* uvs,
                                                 const float* colors, const std::int64_t* material,
                                                 std::int64_t face_count, const double* factors,
                                                 const std::uint8_t* const* textures, const std::int64_t* layout,
                                                 std::int64_t material_count, const float* size,
                                                 const std::int64_t* shape, double mip_level_offset,
                                                 std::int64_t threads, std::int64_t* count);
O_VOXEL_API void o_voxel_attributes_copy(const OVoxelAttributes* result, std::int32_t* coords, std::uint8_t* values);
O_VOXEL_API void o_voxel_attributes_free(OVoxelAttributes* result);
