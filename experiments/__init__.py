"""Commands: training, evaluation, sampling, benchmarks.

Only this package knows Hydra, files, plots, Orbax and progress bars. The library
below, `jaxpara`, is pure.
"""
