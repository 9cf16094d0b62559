"""Gradients through a solved chain: the methods that `gradient=` takes, and what one of your own is made of."""

from .linearized import LinearizedChain as LinearizedChain
from .linearized import Pulled as Pulled
from .methods import Adjoint as Adjoint
from .methods import Exact as Exact
from .methods import Implicit as Implicit
from .methods import Phantom as Phantom
from .pullback import Gradient as Gradient
