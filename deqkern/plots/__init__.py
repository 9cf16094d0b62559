"""Pictures for people: grids of samples, curves, stored runs. matplotlib is imported when the first one is made."""

from .curves import Curve as Curve
from .curves import convergence as convergence
from .pictures import amplified as amplified
from .pictures import grid as grid
from .pictures import panelled as panelled
from .pictures import save_comparison as save_comparison
from .pictures import save_inversion as save_inversion
from .stored_runs import runs_figure as runs_figure
from .stored_runs import save_runs as save_runs
