"""The task of a training run: the interface between the trainer and everything else.

A task is made by a function with plain arguments; `conf/task/NAME.yaml` names that
function and its arguments, and `task=NAME` selects it. The trainer knows nothing more.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from jaxpara.types import Loss, Model, Params


class Batches(Protocol):
    """An endless iterator whose position can be saved: Grain's protocol.

    `get_state` returns JSON-able values that describe the position after the last returned
    batch, whatever was fetched ahead. After `set_state` the same batches follow as then.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class Table(NamedTuple):
    """Rows measured at each evaluation besides the figures, written to their own CSV file.

    Attributes:
      columns: names; the file begins with `step` and `tokens`.
      rows: `params -> rows`, values by column.
      describe: `rows -> text` for the line that announces an evaluation.
    """

    columns: Sequence[str]
    rows: Callable[[Params], list[dict[str, float]]]
    describe: Callable[[list[dict[str, float]]], str]


class Task(NamedTuple):
    """A model, its loss, its data and its evaluation.

    Attributes:
      model: its `init` makes the parameters.
      loss: `(params, batch, key) -> (scalar, metrics)`; the metrics hold `loss`, in nats.
      batches: in the order of the run; a batch is a pytree of arrays.
      tokens_per_step: predicted tokens in a batch.
      columns: of `metrics.csv`: the figures that `evaluate` returns.
      evaluate: `(step, params) -> figures` by column; its time is not training time.
      best: the column by which the best checkpoint is chosen, and whether "min" or "max" is best.
      describe: `figures -> text` for the line that announces an evaluation.
      finish: `(folder, params, summary) -> None`, called once after the last step; what it adds
        to the summary is written to `summary.json`.
      about: one line on the data, printed at the start.
      summary: values known before the first step, part of `summary.json`.
      bytes_per_token: of text whose tokens the loss predicts: bits per byte are then shown and
        written; None: the task is not about text.
      tables: further measurements at each evaluation, by file name without `.csv`.
      solved: `figures -> bool`: whether to stop after this evaluation.
      trainable: `params -> booleans` in their structure, if not all of them are trained.
      batch_like: shapes and dtypes of a batch, for the estimate of memory; None: no estimate.
    """

    model: Model
    loss: Loss
    batches: Batches
    tokens_per_step: int
    columns: Sequence[str]
    evaluate: Callable[[int, Params], dict[str, float]]
    best: tuple[str, Literal["min", "max"]]
    describe: Callable[[dict[str, float]], str]
    finish: Callable[[Path, Params, dict[str, Any]], None]
    about: str
    summary: Mapping[str, Any] = {}
    bytes_per_token: float | None = None
    tables: Mapping[str, Table] = {}
    solved: Callable[[dict[str, float]], bool] | None = None
    trainable: Callable[[Params], Any] | None = None
    batch_like: Any = None
