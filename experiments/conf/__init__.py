"""Hydra's configuration groups: every member names its object by `_target_`."""
