"""Builds deqkern._C with CMake. DEQKERN_CUDA=AUTO|ON|OFF; CMAKE_ARGS adds options; MAX_JOBS limits the build."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _tool(name: str) -> str:
    """The program in the wheel of that name if it is there, else the one on the path."""
    with contextlib.suppress(ImportError):
        wheel = importlib.import_module(name)
        program = Path(getattr(wheel, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", "")) / name
        if program.is_file():
            return str(program)
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"building deqkern needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures and builds one persistent tree, then installs the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cache = tree / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(tree)  # the tree of a checkout that was somewhere else
        cmake = _tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),  # the cached one may lie in a build environment that is gone
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DEQKERN_CUDA": os.environ.get("DEQKERN_CUDA", "AUTO"),
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *defines, *extra], check=True)
        subprocess.run([cmake, "--build", tree, "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", tree, "--prefix", target], check=True)


setup(
    packages=[*find_packages(include=["deqkern", "deqkern.*"]), "deqkern.kernels"],
    package_dir={"deqkern": "deqkern", "deqkern.kernels": "kernels"},
    ext_modules=[Extension("deqkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
