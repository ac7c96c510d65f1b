"""One training step, timed: the models learn, and the twins in PyTorch are of the same size."""

import jax
import pytest

from experiments.contest import training_step
from experiments.contest.timing import Timing
from experiments.contest.training_step import MIXERS, TWINS, Sizes
from experiments.step_time import table
from jaxpara import nn

TINY = Sizes(batch_size=2, window=12, width=16, layers=1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_call_takes_a_step(mixer):
    prepared = training_step.ours(mixer, TINY)
    losses = [float(prepared.call()) for _ in range(30)]
    assert prepared.compile_s > 0 and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_twin_takes_steps_too_and_is_no_smaller(mixer):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    call = training_step.twin(mixer, TINY).call
    losses = [call() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
    twin = sum(p.numel() for p in training_step.torch_model(mixer, TINY).parameters())
    model = nn.decoder(training_step.VOCABULARY, TINY.width, TINY.layers, mixer=MIXERS[mixer])
    own = sum(p.size for p in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    # An LSTM has dense recurrences, and one gate more than the GRU.
    assert twin == own if mixer == "attention" else twin > own


def test_the_table_compares_each_model_with_its_twin():
    def timing(ms):
        return Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 3, 1.0)

    own = {mixer: timing(50 * (i + 1)) for i, mixer in enumerate(MIXERS)}
    both = own | {TWINS[mixer]: timing(100) for mixer in MIXERS}
    ratios = [list(table(t, 100, "").columns[3].cells) for t in (own, both)]
    assert ratios == [["", ""], ["0.50", "", "1.00", ""]]
    assert list(table(own, 100, "").columns[2].cells) == ["2000", "1000"]
