// Checks the arguments of every op, picks its body by the device, and hands it to Python as o_voxel._C.
#include <torch/extension.h>

#include "checks.h"
#include "lookup/lookup.h"
#include "voxelize/voxelize.h"

#ifdef O_VOXEL_WITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Returns the result of the body for the tensor's device.
#define O_VOXEL_RUN(tensor, op, ...)                                                                               \
  if constexpr (kHasCuda) {                                                                                        \
    if ((tensor).is_cuda()) {                                                                                      \
      return op##_cuda(__VA_ARGS__);                                                                               \
    }                                                                                                              \
  }                                                                                                                \
  TORCH_CHECK((tensor).is_cpu(), #op " has no compiled body for ", (tensor).device(), "; for CUDA, where a toolkit " \
                                     "is installed, run: python -m o_voxel.build --cuda");                         \
  return op##_cpu(__VA_ARGS__)

namespace o_voxel {

at::Tensor voxel_table(const at::Tensor& coords) {
  O_VOXEL_CHECK_COLUMNS(coords, 4);
  O_VOXEL_CHECK_DTYPE(coords, at::kInt);
  TORCH_CHECK(coords.size(0) <= kMaxVoxels, "coords has ", coords.size(0), " rows; at most ", kMaxVoxels, " fit");
  O_VOXEL_RUN(coords, voxel_table, packed(coords));
}

at::Tensor voxel_rows(const at::Tensor& table, const at::Tensor& coords, const at::Tensor& queries) {
  O_VOXEL_CHECK_COLUMNS(coords, 4);
  O_VOXEL_CHECK_COLUMNS(queries, 4);
  O_VOXEL_CHECK_DTYPE(coords, at::kInt);
  O_VOXEL_CHECK_DTYPE(queries, at::kInt);
  O_VOXEL_CHECK_DTYPE(table, at::kLong);
  O_VOXEL_CHECK_SAME_DEVICE(table, coords);
  O_VOXEL_CHECK_SAME_DEVICE(queries, coords);
  TORCH_CHECK(table.dim() == 1 && table.is_contiguous() && table.size(0) == table_slots(coords.size(0)),
              "table is not the table of coords");
  O_VOXEL_RUN(coords, voxel_rows, table, packed(coords), packed(queries));
}

}  // namespace o_voxel

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  module.attr("has_cuda") = kHasCuda;
  module.def("voxel_table", &o_voxel::voxel_table, py::arg("coords"), py::call_guard<py::gil_scoped_release>(),
             "Hash table of (N, 4) int32 voxels [batch, x, y, z], no row twice.");
  module.def("voxel_rows", &o_voxel::voxel_rows, py::arg("table"), py::arg("coords"), py::arg("queries"),
             py::call_guard<py::gil_scoped_release>(),
             "(M,) int64: row in coords of each of the (M, 4) int32 queries, or -1.");
  module.def("open_sides", &o_voxel::open_sides, py::arg("faces"), py::call_guard<py::gil_scoped_release>(),
             "(B,) int64: the sides that only one of (F, 3) int64 triangles has.");
  module.def("dual_grid", &o_voxel::dual_grid, py::arg("corners"), py::arg("open_start"), py::arg("open_end"),
             py::arg("size"), py::arg("shape"), py::arg("face_weight"), py::arg("boundary_weight"),
             py::arg("regularization"), py::call_guard<py::gil_scoped_release>(),
             "Flexible dual grid of (F, 3, 3) float32 triangles, on a CPU; voxelize.py checks the arguments.");
  module.def("attributes", &o_voxel::attributes, py::arg("corners"), py::arg("normals"), py::arg("uvs"),
             py::arg("colors"), py::arg("material"), py::arg("factors"), py::arg("textures"), py::arg("layout"),
             py::arg("size"), py::arg("shape"), py::arg("mip_level_offset"), py::call_guard<py::gil_scoped_release>(),
             "Voxel attributes of textured triangles, on a CPU; attributes.py checks the arguments.");
}
