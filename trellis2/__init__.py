"""TRELLIS.2 image-to-3D inference."""
