"""Programs that people run: training, evaluation, sampling, benchmarks.

The only place that knows Hydra, files, plots, Orbax and progress bars. The
library below, `jaxpara`, is pure.
"""
