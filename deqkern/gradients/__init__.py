"""Gradients through a solved chain: the methods that `gradient=` takes."""

from .methods import Adjoint as Adjoint
from .methods import Exact as Exact
from .methods import Gradient as Gradient
from .methods import Implicit as Implicit
from .methods import Phantom as Phantom
