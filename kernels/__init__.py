"""Triton kernels, one file per op. Importable only as `deqkern.kernels`: `kernels` is another package's name."""

if __name__ != "deqkern.kernels":
    raise ImportError("this folder is deqkern.kernels; it is not a package called 'kernels'")
