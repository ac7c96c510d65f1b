"""Times one training step of the default models: `python -m experiments.step_time`.

Times the ParaGRU decoder and the attention decoder, each beside its twin in PyTorch if that is
installed, in one process and in turn. Shows medians and quartiles without compilation.
"""

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.contest import training_step
from experiments.contest.machine import machine
from experiments.contest.timing import Timing, measure
from experiments.contest.training_step import MIXERS, TWINS, Sizes
from experiments.shell.commandline import command, guarded

COLUMNS = ("model", "ms, median (quartiles)", "tokens/s", "x its twin", "compile s")


def timed(sizes: Sizes, *, rounds: int, budget_s: float) -> dict[str, Timing]:
    """Times a step of each of `MIXERS` and, with PyTorch, of each of `TWINS`.

    Args:
      sizes: of the models and batches.
      rounds: number of timed steps.
      budget_s: seconds of timing.
    """
    calls = {mixer: training_step.ours(mixer, sizes) for mixer in MIXERS}
    if training_step.torch_is_there():
        calls |= {TWINS[mixer]: training_step.twin(mixer, sizes) for mixer in MIXERS}
    return measure(calls, rounds=rounds, budget_s=budget_s)


def table(timings: dict[str, Timing], tokens: int, title: str) -> Table:
    """Makes a row for each model, ours before its twin."""
    made = Table(*COLUMNS, title=title)
    for mixer, other in TWINS.items():
        twin = timings.get(other)
        for name in (mixer, other):
            if (t := timings.get(name)) is None:
                continue
            ratio = f"{t.median / twin.median:.2f}" if twin and name == mixer else ""
            made.add_row(
                name,
                f"{t.median * 1e3:.0f} ({t.low * 1e3:.0f}, {t.high * 1e3:.0f})",
                f"{tokens / t.median:.0f}",
                ratio,
                f"{t.compile_s:.1f}",
            )
    return made


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="step_time")
def main(cfg: DictConfig) -> None:
    """Entry of `python -m experiments.step_time`."""

    def program():
        sizes = Sizes(cfg.batch_size, cfg.window, cfg.width, cfg.layers)
        timings = timed(sizes, rounds=cfg.rounds, budget_s=cfg.budget_s)
        console = Console()
        console = console if console.is_terminal else Console(width=160)
        console.print(table(timings, sizes.batch_size * sizes.window, machine()))
        if not training_step.torch_is_there():
            console.print("PyTorch is not installed: pip install torch to compare with its steps")

    guarded(program, cfg)


if __name__ == "__main__":
    main()
