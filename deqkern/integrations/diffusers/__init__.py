"""diffusers pipelines, unmodified: `parallel` solves their loop for all steps at once, `invert` runs it back."""

from .context import parallel
from .inversion import invert
from .run import ParallelRun

__all__ = ["ParallelRun", "invert", "parallel"]
