"""deqkern: parallel-in-time sampling of diffusion models."""

from pathlib import Path

from . import gradients as gradients
from . import slopes as slopes
from . import solvers as solvers
from .calibration import calibrate as calibrate
from .inversion import invert as invert
from .optimization import Optimize as Optimize
from .sampling import sample as sample
from .schedule import NoiseSchedule as NoiseSchedule
from .slopes import SlopeProfile as SlopeProfile
from .solve import ConvergenceWarning as ConvergenceWarning
from .solve import Solution as Solution

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir():  # not installed: then deqkern.kernels is the folder kernels/ beside this one
    __path__.append(str(_checkout))
