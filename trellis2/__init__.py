"""TRELLIS.2 image-to-3D inference: one picture in; a textured GLB, a turntable MP4 and a cut-out PNG out.

The names here load quickly; the pipeline, which needs torch, is ``trellis2.pipeline.Pipeline``.
"""

from .errors import Cancelled, CapacityError, CheckpointError, InputError, TrellisError
from .options import GenerateOptions
from .version import VERSION as __version__

__all__ = [
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "GenerateOptions",
    "InputError",
    "TrellisError",
    "__version__",
]
