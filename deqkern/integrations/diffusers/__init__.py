"""diffusers pipelines, unmodified: `parallel` solves their loop for all steps at once, `invert` runs it back."""

from .inversion import invert
from .run import ParallelRun, parallel

__all__ = ["ParallelRun", "invert", "parallel"]
