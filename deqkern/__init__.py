"""deqkern: parallel-in-time sampling, inversion and gradients of diffusion models."""

import sys as _sys
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path

from . import gradients, interpolation, nn, runs, slopes, solvers
from .calibration import calibrate
from .chain.schedule import NoiseSchedule
from .engine.loop import Solve
from .engine.rows import Rows
from .engine.solution import ConvergenceWarning, Solution
from .fixed_point.measures import PathIndependence, jacobian_regularization, path_independence, spectral_radius
from .fixed_point.solve import fixed_point
from .inversion import invert
from .network.guidance import guided
from .network.replication import replicated
from .optimization import Optimize
from .planning import Plan, plan
from .sampling import begin, sample
from .solvers.slopes import SlopeProfile
from .support.version import version as _version

__all__ = [
    "ConvergenceWarning",
    "NoiseSchedule",
    "Optimize",
    "PathIndependence",
    "Plan",
    "Rows",
    "SlopeProfile",
    "Solution",
    "Solve",
    "begin",
    "calibrate",
    "fixed_point",
    "gradients",
    "guided",
    "interpolation",
    "invert",
    "jacobian_regularization",
    "nn",
    "path_independence",
    "plan",
    "replicated",
    "runs",
    "sample",
    "slopes",
    "solvers",
    "spectral_radius",
]

__version__ = _version()

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir():  # not installed: then deqkern.kernels is the folder kernels/ beside this one
    _kernels = _ModuleSpec("deqkern.kernels", None, is_package=True)
    _kernels.submodule_search_locations = [str(_checkout / "kernels")]
    _sys.modules["deqkern.kernels"] = _module_from_spec(_kernels)
