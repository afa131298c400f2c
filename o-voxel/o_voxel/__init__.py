"""O-Voxel geometry ops: one file per op, a plain reference beside every fast body.

``convert``, ``io``, ``postprocess``, ``rasterize`` and ``serialize`` are there after ``import o_voxel``, as in the
original package.
"""

from . import convert, io, postprocess, rasterize, serialize

__all__ = ["convert", "io", "postprocess", "rasterize", "serialize"]
