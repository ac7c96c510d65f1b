"""Recurrent cells: nonlinear ones solved in parallel over time, and linear controls.

A cell is a `jaxpara.types.Cell` of pure functions, made by a factory `cell(features, hidden,
...)`; `run` takes it over a sequence. Recurrent weights are vectors (`para_gru`, `para_lstm`,
`slstm`, `elman`), one matrix a head (`*_heads`), or absent (`min_gru`, `linear`).
"""

from jaxpara.recurrence.cells.common import clip_recurrent as clip_recurrent
from jaxpara.recurrence.cells.common import run as run
from jaxpara.recurrence.cells.diagonal import elman as elman
from jaxpara.recurrence.cells.diagonal import para_gru as para_gru
from jaxpara.recurrence.cells.diagonal import para_lstm as para_lstm
from jaxpara.recurrence.cells.diagonal import slstm as slstm
from jaxpara.recurrence.cells.heads import elman_heads as elman_heads
from jaxpara.recurrence.cells.heads import gru_heads as gru_heads
from jaxpara.recurrence.cells.heads import lstm_heads as lstm_heads
from jaxpara.recurrence.cells.linear import linear as linear
from jaxpara.recurrence.cells.linear import min_gru as min_gru
