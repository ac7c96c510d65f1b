"""Measurements without Hydra: kernels on a device, and other people's code beside ours."""
