"""Pure JAX functions, trained in parallel: over time, devices, experts, bits and ranks."""

import importlib as _importlib
import importlib.metadata as _metadata

from jaxpara import nn as nn
from jaxpara import train as train
from jaxpara import weights as weights
from jaxpara.recurrence import cells as cells
from jaxpara.recurrence import structure as structure
from jaxpara.recurrence.choice import Choice as Choice
from jaxpara.recurrence.choice import explain_choice as explain_choice
from jaxpara.recurrence.linear import linear_recurrence as linear_recurrence
from jaxpara.recurrence.reset import with_reset as with_reset
from jaxpara.recurrence.scan import SolveInfo as SolveInfo
from jaxpara.recurrence.scan import newton_scan as newton_scan
from jaxpara.recurrence.scan import solve_scan as solve_scan
from jaxpara.recurrence.solvers import auto as auto
from jaxpara.recurrence.solvers import fused as fused
from jaxpara.recurrence.solvers import jacobi as jacobi
from jaxpara.recurrence.solvers import newton as newton
from jaxpara.recurrence.solvers import quasi_newton as quasi_newton
from jaxpara.recurrence.solvers import sequential as sequential
from jaxpara.recurrence.solvers import shooting as shooting
from jaxpara.recurrence.structure.proof import Structure as Structure
from jaxpara.recurrence.structure.proof import jacobian_structure as jacobian_structure
from jaxpara.recurrence.structure.proof import unchecked as unchecked
from jaxpara.recurrence.system import Solver as Solver
from jaxpara.tree import combine as combine
from jaxpara.tree import marked as marked
from jaxpara.tree import split as split
from jaxpara.types import Cell as Cell
from jaxpara.types import Model as Model
from jaxpara.types import TrainState as TrainState
from jaxpara.weights.dora import dora as dora
from jaxpara.weights.ia3 import ia3 as ia3
from jaxpara.weights.lift import lift as lift
from jaxpara.weights.lora import lora as lora
from jaxpara.weights.mos import mos as mos
from jaxpara.weights.paca import paca as paca
from jaxpara.weights.pools import Pooled as Pooled
from jaxpara.weights.quant.easy import easy_quant as easy_quant
from jaxpara.weights.quant.fake import fake_quant as fake_quant
from jaxpara.weights.quant.fake import ternary as ternary
from jaxpara.weights.quant.flexq import flexq as flexq
from jaxpara.weights.quant.frozen import rtn as rtn
from jaxpara.weights.quant.lr_qat import lr_qat as lr_qat
from jaxpara.weights.quant.lsq import l4q as l4q
from jaxpara.weights.quant.lsq import lsq as lsq
from jaxpara.weights.quant.nf4 import nf4 as nf4
from jaxpara.weights.quant.number_format import number_format as number_format
from jaxpara.weights.reparam import Reparam as Reparam
from jaxpara.weights.reparam import chain as chain
from jaxpara.weights.sparse import bdwp as bdwp
from jaxpara.weights.sparse import sparse_nm as sparse_nm
from jaxpara.weights.weight import Weight as Weight


def __getattr__(name: str):
    """What is imported when first asked for: `jp.linen` and `jp.nnx`, which need Flax, and more."""
    if name in ("linen", "nnx", "testing"):
        return _importlib.import_module(f"jaxpara.{name}")
    if name == "__version__":
        return _metadata.version("jaxpara")
    raise AttributeError(f"module 'jaxpara' has no attribute {name!r}")
