"""Pure-function layers, token mixers, and the decoder that the experiments train."""

from jaxpara.nn import mixers as mixers
from jaxpara.nn.adapters import adapted_mixer as adapted_mixer
from jaxpara.nn.adapters import adapted_mlp as adapted_mlp
from jaxpara.nn.adapters import bottleneck as bottleneck
from jaxpara.nn.adapters import parallel_adapter as parallel_adapter
from jaxpara.nn.adapters import sequential_adapter as sequential_adapter
from jaxpara.nn.conv import short_conv as short_conv
from jaxpara.nn.decoder import block as block
from jaxpara.nn.decoder import decoder as decoder
from jaxpara.nn.layers import embedding as embedding
from jaxpara.nn.layers import linear as linear
from jaxpara.nn.layers import rms_norm as rms_norm
from jaxpara.nn.layers import swiglu as swiglu
from jaxpara.nn.mixers import Mixer as Mixer
