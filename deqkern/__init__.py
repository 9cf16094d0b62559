"""deqkern: parallel-in-time sampling of diffusion models."""

from pathlib import Path

from . import gradients as gradients
from . import interpolation as interpolation
from . import nn as nn
from . import runs as runs
from . import slopes as slopes
from . import solvers as solvers
from .calibration import calibrate as calibrate
from .fixed_point import fixed_point as fixed_point
from .guidance import guided as guided
from .inversion import invert as invert
from .measures import PathIndependence as PathIndependence
from .measures import jacobian_regularization as jacobian_regularization
from .measures import path_independence as path_independence
from .measures import spectral_radius as spectral_radius
from .optimization import Optimize as Optimize
from .planning import Plan as Plan
from .planning import plan as plan
from .replication import replicated as replicated
from .sampling import sample as sample
from .schedule import NoiseSchedule as NoiseSchedule
from .slopes import SlopeProfile as SlopeProfile
from .solve import ConvergenceWarning as ConvergenceWarning
from .solve import Solution as Solution
from .version import version as _version

__version__ = _version()

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir():  # not installed: then deqkern.kernels is the folder kernels/ beside this one
    __path__.append(str(_checkout))
