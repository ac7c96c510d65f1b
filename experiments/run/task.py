"""What a training run needs to know of its task: the seam between the trainer and everything else.

A task is made by a function with plain arguments; `conf/task/NAME.yaml` names that
function and its arguments, and `task=NAME` picks it. The trainer knows nothing more.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from jaxpara.types import Loss, Model, Params


class Batches(Protocol):
    """An endless iterator whose position can be saved: Grain's protocol.

    `get_state` is JSON-able and describes the position after the last batch that was
    returned, whatever was fetched ahead; after `set_state` the batches that follow are
    the ones that followed then.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class Table(NamedTuple):
    """Rows measured at each evaluation beside the figures, written to a CSV file of their own.

    Attributes:
      columns: names; the file begins with `step` and `tokens`.
      rows: `params -> rows`, values by column.
      describe: `rows -> text` for the line that announces an evaluation.
    """

    columns: Sequence[str]
    rows: Callable[[Params], list[dict[str, float]]]
    describe: Callable[[list[dict[str, float]]], str]


class Task(NamedTuple):
    """What is trained, on what, and how it is judged.

    Attributes:
      model: its `init` makes the parameters.
      loss: `(params, batch, key) -> (scalar, metrics)`; the metrics hold `loss`, in nats.
      batches: in the order of the run; a batch is a pytree of arrays.
      tokens_per_step: predicted tokens in a batch.
      columns: of `metrics.csv`, the figures that `evaluate` gives.
      evaluate: `(step, params) -> figures` by column; its time is not training time.
      best: the column by which the best checkpoint is chosen, and whether "min" or "max" is best.
      describe: `figures -> text` for the line that announces an evaluation.
      finish: `(folder, params, summary) -> None`, once after the last step; what it adds to the
        summary is written to `summary.json`.
      about: one line on the data, said at the start.
      summary: what is known before the first step, part of `summary.json`.
      bytes_per_token: of text, where the loss is that of its tokens: bits per byte are then
        shown and written; None: the task is not about text.
      tables: further measurements at each evaluation, by file name without `.csv`.
      solved: `figures -> bool`: after which evaluation to stop before the last step.
      trainable: `params -> booleans` in their structure, where not all of them are trained.
      batch_like: shapes and dtypes of a batch, for the estimate of memory; None: it is not made.
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
