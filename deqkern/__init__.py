"""deqkern: parallel-in-time sampling of diffusion models."""

from . import solvers as solvers
from .sampling import sample as sample
from .schedule import NoiseSchedule as NoiseSchedule
from .solve import ConvergenceWarning as ConvergenceWarning
from .solve import Solution as Solution
