"""Models of d output / d x for a `deqkern.solvers.Solver`, and what one of your own is made of."""

from .solvers.slopes import Frozen as Frozen
from .solvers.slopes import Gaussian as Gaussian
from .solvers.slopes import LearningSlope as LearningSlope
from .solvers.slopes import Secant as Secant
from .solvers.slopes import Slope as Slope
from .solvers.slopes import SlopeProfile as SlopeProfile
