"""TRELLIS.2 image-to-3D inference: one picture in; a textured GLB, a turntable MP4 and a cut-out PNG out."""

from importlib.metadata import version

__version__ = version("trellis2")
