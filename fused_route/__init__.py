"""Routed low-rank fine-tuning of vision-language models (arXiv 2403.09377)."""

__version__ = "0.1.0"

from .attach import Attached as Attached
from .attach import attach as attach
from .config import RoutedConfig as RoutedConfig
from .context import RoutingContext as RoutingContext
from .context import VisualProjector as VisualProjector
from .fold import Folded as Folded
from .fold import fold as fold
from .fold import unfold as unfold
from .functional import routed_adapter as routed_adapter
from .functional import routed_linear as routed_linear
from .merge import merge as merge
from .modules import RoutedAdapter as RoutedAdapter
from .modules import RoutedLinear as RoutedLinear
from .published import load_published as load_published
from .reference import Dropout as Dropout
from .routes import ROUTES as ROUTES
from .routes import Operand as Operand
from .routes import Route as Route
from .routes import identity as identity
from .routes import matrix as matrix
from .routes import rank1 as rank1
from .routes import scale as scale
from .routes import shift as shift
from .routing import Routing as Routing
from .routing_input import RoutingInput as RoutingInput
from .routing_input import masked_mean as masked_mean
