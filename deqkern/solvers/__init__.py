"""Solvers: a choice of slope, mixing, window and thinning; the presets are the known ones and the default."""

from .presets import Solver as Solver
from .presets import anderson as anderson
from .presets import default as default
from .presets import deq_ddim as deq_ddim
from .presets import parataa as parataa
from .presets import picard as picard
from .presets import sequential as sequential
