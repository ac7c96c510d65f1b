"""Commands: training, evaluation, sampling, benchmarks.

Only this package knows Hydra, files, plots, Orbax and progress bars. The library
below, `jaxpara`, is pure.
"""

import sys

from experiments.run import interrupts

# Of a command: before JAX is imported, whose callback would lose a Ctrl-C meanwhile.
if sys.argv[0] == "-m":
    interrupts.note()
    sys.excepthook = interrupts.in_one_line
    sys.unraisablehook = interrupts.dropped
