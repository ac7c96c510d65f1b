"""Which entries of the Jacobian of a step can be non-zero: proved from the step's equations."""

from jaxpara.recurrence.structure.kinds import Block as Block
from jaxpara.recurrence.structure.kinds import Dense as Dense
from jaxpara.recurrence.structure.kinds import Diagonal as Diagonal
