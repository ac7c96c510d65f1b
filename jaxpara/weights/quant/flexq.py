"""FlexQ: six bits for weights and activations, eight where activations are sensitive. [flexq]"""

from typing import Any, NamedTuple

from jaxpara.sizes import needed
from jaxpara.tree import Where, matcher
from jaxpara.weights.quant.fake import fake_quant
from jaxpara.weights.reparam import Reparam, chain


def flexq(
    *, sensitive: Where = None, group: int | None = 128, bits: int = 6, where: Where = None
) -> Reparam:
    """Quantises weights and the activations that they meet, by FlexQ's rules (W6A6).

    Both have symmetric grids with a scale for each group along the contraction. The scales are
    taken from their current largest magnitudes: nothing is calibrated. Products of sensitive
    leaves keep eight bits for the activations. Attention probabilities are not multiplied with a
    weight: give `jp.weights.unit_grid` to the attention.

    Args:
      sensitive: leaves whose activations get eight bits, of those that `where` selects and
        given in the same way, for example "blocks/*/down"; None: none.
      group: consecutive entries along the axis -2 that share a scale; None: all.
      bits: of the weights and of the other activations.
      where: the leaves: a glob (`*` within a name, `**` across names), a compiled regular
        expression, or a function of (path, leaf); None: floating leaves of two or more axes.

    Returns:
      The reparameterisation, `chain(fake_quant(...), fake_quant(...))`; merged weights are
      multiplied as integers with integers.

    Raises:
      ValueError: as for `fake_quant`; when attached also: `sensitive` selects nothing.

    References: [flexq].
    """
    bits = needed(bits=bits)
    options = {"bits": bits, "group": group}
    if sensitive is None:
        return fake_quant(activations=bits, where=where, **options)
    return chain(
        _member(fake_quant(activations=bits, where=_Part(where, sensitive, False), **options)),
        fake_quant(activations=8, where=_Part(where, sensitive, True), **options),
    )


class _Part(NamedTuple):
    """Of the leaves that `where` selects, the sensitive ones, or the others."""

    where: Where
    sensitive: Where
    special: bool

    def __call__(self, path: str, leaf: Any) -> bool:
        chosen = matcher(self.where)(path, leaf)
        return chosen and bool(matcher(self.sensitive)(path, leaf)) == self.special

    def __repr__(self) -> str:
        return repr(self.sensitive) if self.special else f"not {self.sensitive!r}"

    @property
    def pattern(self) -> str:
        """What a near miss is looked for with."""
        given = self.sensitive
        return given if isinstance(given, str) else getattr(given, "pattern", "")


def _member(plain: Reparam) -> Reparam:
    """Where all leaves are sensitive there are no others."""
    return Reparam(tuple(member._replace(optional=True) for member in plain.members))
