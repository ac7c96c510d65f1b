"""FlexQ: six bits for weights and activations, eight where activations are sensitive. [flexq]"""

from jaxpara.tree import Where, matcher
from jaxpara.weights.quant.fake import fake_quant
from jaxpara.weights.reparam import Reparam, chain


def flexq(
    *, sensitive: Where = None, group: int | None = 128, bits: int = 6, where: Where = None
) -> Reparam:
    """Quantises weights and what they are multiplied with, by FlexQ's rules (W6A6).

    Both stand on symmetric grids with a scale for each group along the contraction, taken from
    their largest magnitudes as they come: nothing is calibrated. Products of sensitive leaves keep
    eight bits for the activations. Attention probabilities are no operand of a weight: give the
    attention `jp.weights.unit_grid`.

    Args:
      sensitive: leaves whose activations get eight bits, of those that `where` selects, for
        example "blocks/*/down"; None: none.
      group: consecutive entries along the axis -2 that share a scale; None: all.
      bits: of the weights and of the other activations.
      where: the leaves, see `jaxpara.tree.matcher`.

    Returns:
      The reparameterisation, `chain(fake_quant(...), fake_quant(...))`; merged weights are
      multiplied as integers with integers.

    Raises:
      ValueError: as for `fake_quant`; when attached also: `sensitive` selects nothing.

    References: [flexq].
    """
    options = {"bits": bits, "group": group}
    if sensitive is None:
        return fake_quant(activations=bits, where=where, **options)
    chosen, special = matcher(where), matcher(sensitive)

    def plain(path, leaf):
        return chosen(path, leaf) and not special(path, leaf)

    def both(path, leaf):
        return chosen(path, leaf) and special(path, leaf)

    # The pattern itself where it is enough: a near miss is then named by it.
    narrow = sensitive if where is None else both
    return chain(
        fake_quant(activations=bits, where=plain, **options),
        fake_quant(activations=8, where=narrow, **options),
    )
