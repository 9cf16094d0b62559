"""Models of d output / d x for a `deqkern.solvers.Solver`."""

from .solvers.slopes import Frozen as Frozen
from .solvers.slopes import Gaussian as Gaussian
from .solvers.slopes import Secant as Secant
from .solvers.slopes import SlopeProfile as SlopeProfile
