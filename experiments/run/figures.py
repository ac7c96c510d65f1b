"""Figures of a run, drawn only from the files in its folder."""

import mmap
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from experiments.run import folders, metrics
from experiments.run.drawing import Figure
from experiments.run.plain_files import replacing

CREATOR = "jaxpara experiments.run.figures"  # in every picture, by which we know it again


def _pairs(columns: Mapping[str, list[float | None]], x: str, y: str) -> tuple[list, list]:
    """The points at which both columns hold a number."""
    points = [(a, b) for a, b in zip(columns[x], columns[y], strict=True) if b is not None]
    return [a for a, _ in points], [b for _, b in points]


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("training tokens (bytes)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)


def draw_loss(
    columns: Mapping[str, list[float | None]],
    rulers: Mapping[str, float | None],
    *,
    title: str,
) -> Figure:
    """Draws training and validation loss against tokens, with baselines as horizontal lines.

    Args:
      columns: `metrics.csv`.
      rulers: bits per byte by name; None is left out.
      title: of the picture.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_pairs(columns, "tokens", "train_bits_per_byte"), lw=1, alpha=0.7, label="training")
    axes.plot(
        *_pairs(columns, "tokens", "validation_bits_per_byte"), marker="o", label="validation"
    )
    for (name, level), style in zip(rulers.items(), (":", "--", "-."), strict=False):
        if level is not None:
            axes.axhline(level, color="black", lw=1, ls=style, label=f"{name} ({level:.2f})")
    axes.set_ylabel("loss (bits per byte)")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    _tokens_axis(axes)
    axes.legend()
    return figure


def draw_accuracy(columns: Mapping[str, list[float | None]], *, title: str) -> Figure:
    """Draws accuracy on held-out sequences against tokens, a line for each length.

    Args:
      columns: of `metrics.csv`; accuracies are named `accuracy_32` and so on.
      title: of the picture.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (name for name in columns if name.startswith("accuracy_")):
        label = f"T = {name.removeprefix('accuracy_')}"
        axes.plot(*_pairs(columns, "tokens", name), marker="o", label=label)
    axes.set_ylabel("accuracy (share of answers)")
    axes.set_ylim(0, 1.02)
    axes.set_title(title)
    _tokens_axis(axes)
    axes.set_xlabel("training tokens")
    axes.legend()
    return figure


def draw_figure(columns: Mapping[str, list[float | None]], judged: str, *, title: str) -> Figure:
    """Draws the training loss and the figure that a task is judged by against tokens.

    Args:
      columns: `metrics.csv`.
      judged: the column of that figure.
      title: of the picture.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(*_pairs(columns, "tokens", "train_loss_nats"), lw=1)
    above.set_ylabel("training loss (nats)")
    above.set_title(title)
    above.grid(alpha=0.3)
    below.plot(*_pairs(columns, "tokens", judged), marker="o")
    below.set_ylabel(judged.replace("_", " "))
    _tokens_axis(below)
    below.set_xlabel("training tokens")
    return figure


def draw_solver(columns: Mapping[str, list[float | None]], *, title: str) -> Figure:
    """Draws iterations and residual of the parallel solver in each layer against tokens.

    Args:
      columns: `solver.csv`.
      title: of the picture.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    layers = sorted({value for value in columns["layer"] if value is not None})
    for layer, width in zip(layers, range(2 * len(layers), 0, -2), strict=True):
        rows = [i for i, value in enumerate(columns["layer"]) if value == layer]
        one = {name: [column[i] for i in rows] for name, column in columns.items()}
        label = f"layer {int(layer)}"
        # Thinner lines on top of thicker ones: layers often agree.
        above.plot(*_pairs(one, "tokens", "iterations"), marker="o", lw=width, label=label)
        tokens, residual = _pairs(one, "tokens", "residual")
        # A logarithmic axis cannot show a residual of exactly zero: draw it at the floor.
        below.plot(tokens, [max(value, 1e-9) for value in residual], marker="o", label=label)
    above.set_ylabel("iterations")
    above.set_ylim(bottom=0)
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    above.set_title(title)
    above.grid(alpha=0.3)
    above.legend()
    below.set_ylabel("largest residual (units of the state)")
    below.set_yscale("log")
    _tokens_axis(below)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, as `plain_files.replacing`.

    Args:
      figure: drawn.
      path: a PNG, PDF or SVG file.
    """
    with replacing(path) as part:
        kind = path.suffix[1:].lower()
        figure.savefig(part, dpi=120, format=kind, metadata={"Creator": CREATOR})


def is_ours(path: Path) -> bool:
    """Whether a picture was written by `save`, which says so in it.

    Args:
      path: of the file.
    """
    if path.is_symlink() or not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(CREATOR.encode()) >= 0


def draw_run(folder: Path) -> list[Path]:
    """Draws every figure for which a run has data.

    Args:
      folder: the run's folder, with `metrics.csv`, perhaps `solver.csv` and `summary.json`.

    Returns:
      The files written.

    Raises:
      FileNotFoundError: there is no `metrics.csv`.
    """
    table = folder / folders.METRICS
    if not table.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.csv: give the folder of a training run")
    summary = {}
    if (folder / "summary.json").is_file():
        summary = folders.read_json(folder / "summary.json")
    name = summary.get("name", folder.name)
    columns = metrics.read(table)
    if "train_bits_per_byte" in columns:
        written = [folder / "loss.png"]
        figure = draw_loss(columns, summary.get("baselines", {}), title=name)
    elif "judged_by" in summary and not any(name.startswith("accuracy_") for name in columns):
        written = [folder / "loss.png"]
        figure = draw_figure(columns, summary["judged_by"][0], title=name)
    else:
        written = [folder / "accuracy.png"]
        figure = draw_accuracy(columns, title=f"{name}: {summary.get('problem', '')}")
    save(figure, written[0])
    solver = folder / "solver.csv"
    if solver.is_file():
        columns = metrics.read(solver)
        if columns["step"]:
            written.append(folder / "solver.png")
            figure = draw_solver(
                columns, title=f"{name}: {summary.get('parallel_solver', 'parallel solver')}"
            )
            save(figure, written[1])
    return written
