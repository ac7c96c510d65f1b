"""Makes the mixer of a width, and says what was given in place of one."""

from collections.abc import Callable
from typing import Any

from jaxpara.arguments import kind_of, takes
from jaxpara.nn.mixers import Mixer

_NO_MIXER = (
    "mixer={}: expected a function width -> Mixer, such as jp.nn.mixers.attention(heads=4) or "
    "jp.nn.mixers.recurrent(jp.cells.para_gru), or for decoder a sequence of them"
)


def need_mixer(make: Any) -> None:
    """Refuses what is not a function of the width.

    Args:
      make: given as a mixer.

    Raises:
      TypeError: it is no function of one argument.
    """
    if not callable(make) or not takes(make, 1):
        raise TypeError(_NO_MIXER.format(kind_of(make)))


def made(make: Callable[[int], Mixer], width: int) -> Mixer:
    """The mixer of a width.

    Args:
      make: a function `width -> Mixer`.
      width: size of the last axis of its inputs.

    Raises:
      TypeError: it is no such function.
    """
    need_mixer(make)
    mixer = make(width)
    if not isinstance(mixer, Mixer):
        raise TypeError(_NO_MIXER.format(kind_of(make)))
    return mixer
