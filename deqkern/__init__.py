"""deqkern: parallel-in-time sampling of diffusion models."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

from . import gradients as gradients
from . import interpolation as interpolation
from . import nn as nn
from . import runs as runs
from . import slopes as slopes
from . import solvers as solvers
from .calibration import calibrate as calibrate
from .chain.schedule import NoiseSchedule as NoiseSchedule
from .engine.loop import Solve as Solve
from .engine.solution import ConvergenceWarning as ConvergenceWarning
from .engine.solution import Solution as Solution
from .fixed_point.measures import PathIndependence as PathIndependence
from .fixed_point.measures import jacobian_regularization as jacobian_regularization
from .fixed_point.measures import path_independence as path_independence
from .fixed_point.measures import spectral_radius as spectral_radius
from .fixed_point.solve import fixed_point as fixed_point
from .inversion import invert as invert
from .network.guidance import guided as guided
from .network.replication import replicated as replicated
from .optimization import Optimize as Optimize
from .planning import Plan as Plan
from .planning import plan as plan
from .sampling import begin as begin
from .sampling import sample as sample
from .solvers.slopes import SlopeProfile as SlopeProfile
from .support.version import version as _version

__version__ = _version()

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir():  # not installed: then deqkern.kernels is the folder kernels/ beside this one
    _kernels = ModuleSpec("deqkern.kernels", None, is_package=True)
    _kernels.submodule_search_locations = [str(_checkout / "kernels")]
    sys.modules["deqkern.kernels"] = module_from_spec(_kernels)
