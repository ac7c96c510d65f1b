"""Functions of reparameterised weights other than training; methods are `jp.NAME`."""

from jaxpara.weights.matrices import Layout as Layout
from jaxpara.weights.parts import adapters as adapters
from jaxpara.weights.parts import with_adapters as with_adapters
from jaxpara.weights.quant.activations import unit_grid as unit_grid
from jaxpara.weights.quant.array import pack as pack
from jaxpara.weights.quant.array import quantised_array as quantised_array
from jaxpara.weights.quant.array import quantised_dot as quantised_dot
from jaxpara.weights.quant.formats import FORMATS as FORMATS
from jaxpara.weights.quant.formats import BlockFormat as BlockFormat
from jaxpara.weights.quant.formats import FixedFormat as FixedFormat
from jaxpara.weights.quant.formats import FloatFormat as FloatFormat
from jaxpara.weights.quant.formats import round_to as round_to
from jaxpara.weights.uses import Layouts as Layouts
from jaxpara.weights.uses import layout as layout
