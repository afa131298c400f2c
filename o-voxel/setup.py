"""Compiles csrc into the wheel where there is a C++ compiler; without one the package is pure Python.

The library knows neither Python nor torch, so one wheel of a platform serves all of their releases.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("build_o_voxel", Path(__file__).parent / "o_voxel" / "build.py")
build_o_voxel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_o_voxel)


class BuildLibrary(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # there, python -m o_voxel.build does it when it is wanted
            return
        folder = Path(self.build_lib) / "o_voxel"
        (folder / build_o_voxel.LIBRARY).unlink(missing_ok=True)  # of an earlier build
        try:
            build_o_voxel.build(folder)
        except build_o_voxel.BuildError as error:
            self.warn(f"o_voxel stays without its compiled part: {error}")
        else:
            self.distribution.has_ext_modules = lambda: True


class PlatformWheel(bdist_wheel):
    def run(self):
        # What is compiled decides the wheel's name, which comes first.
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        platform = "any" if self.root_is_pure else super().get_tag()[2]
        return "py3", "none", platform


setuptools.setup(cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel})
