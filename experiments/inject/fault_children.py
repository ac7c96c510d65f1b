"""The processes that `experiments.faults` kills, starves and blocks."""

import itertools
import json
import resource
import sys
import time
from pathlib import Path

from experiments.inject import injection
from experiments.run import checkpoints, claim, folders


def save(folder: Path) -> None:
    """Saves step after step, from the newest one, until it is killed.

    Args:
      folder: of the run.
    """
    begin = max(checkpoints.steps(folder), default=0)
    rule = {"keep_last": 3, "keep_best": 0, "best": ("loss", "min")}
    with checkpoints.saver(folder, begin=begin or None, **rule) as save:
        for step in itertools.count(begin + 1):
            save(injection.state_after(step), {"data": {"position": step}}, None)


def fill(folder: Path, limits: list[int]) -> None:
    """Saves under a limit on file sizes; prints a line of JSON for each limit.

    Args:
      folder: of runs.
      limits: bytes that a file may have.
    """
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in limits:
        run = folder / str(limit)
        injection.save_steps(run, 1)
        whole = injection.state_after(2)

        def again(run: Path = run, limit: int = limit, whole=whole) -> None:
            rule = {"keep_last": 9, "keep_best": 0, "best": ("loss", "min")}
            with checkpoints.saver(run, **rule) as save:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                save(whole, {"data": {"position": 2}}, None)

        event = injection.judge("", again, lambda found: True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        kept = injection.restore(run)
        newest = 2 if event.end == "survived" else 1
        if int(kept[0].step) != newest or not injection.is_right(kept):
            event = event._replace(end="wrong", said="the checkpoint before it is not intact")
        print(json.dumps({"end": event.end, "said": event.said}), flush=True)


def hold(folder: Path) -> None:
    """Holds a run's folder until it is killed.

    Args:
      folder: of the run.
    """
    with claim.claimed(folder):
        print("held", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    which, place, *rest = sys.argv[1:]
    try:
        {"save": save, "fill": lambda f: fill(f, [int(n) for n in rest]), "hold": hold}[which](
            Path(place)
        )
    except folders.RunError as error:
        raise SystemExit(f"error: {error}") from None
