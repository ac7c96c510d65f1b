"""Runs that are stopped at a given step, and what makes two runs the same."""

import json
import signal
from contextlib import contextmanager

import jax
import numpy as np

from experiments.run import checkpoints, metrics, trainer

# Of the machine, not of the run.
MEASURED = {"seconds", "tokens_per_second", "memory_bytes", "model_flops_per_second"}
MEASURED |= {"training_seconds", "compile_seconds", "model_flops_per_token", "solvers"}
MEASURED |= {"step_memory_bytes"}  # as the other costs, of a step that was compiled


def stopper(monkeypatch):
    """A function by which runs get Ctrl-C at exactly a step; None lets them come to their end."""

    def choose(step):
        @contextmanager
        def stop_signal():
            asked = 0

            def stopped():  # asked once a step, and once more at the end
                nonlocal asked
                asked += 1
                return signal.SIGINT if step is not None and asked >= step else None

            yield stopped

        monkeypatch.setattr(trainer, "stop_signal", stop_signal)

    return choose


def check_same_state(folder, whole, like):
    """The last checkpoints hold the same numbers, bit for bit."""
    found = []
    for one in (folder, whole):
        state, run = checkpoints.restore(one, checkpoints.steps(one)[-1], like)
        state = state._replace(key=jax.random.key_data(state.key))
        run["memory"] = run["memory"]["losses"]
        found.append((jax.tree.leaves(state), run))
    assert all(map(np.array_equal, found[0][0], found[1][0]))
    assert found[0][1] == found[1][1]
    assert checkpoints.steps(folder) == checkpoints.steps(whole)


def check_same_files(folder, whole):
    """Tables and summary agree in all but what depends on the machine; the same files are there."""
    names = [{path.name for path in f.iterdir()} for f in (folder, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".csv"):
            rows, expected = metrics.read(folder / name), metrics.read(whole / name)
            assert list(rows) == list(expected)
            assert all(rows[c] == expected[c] for c in set(rows) - MEASURED), name
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    assert one.keys() | MEASURED == two.keys() | MEASURED
    assert {k: one[k] for k in one.keys() - MEASURED} == {k: two[k] for k in two.keys() - MEASURED}
