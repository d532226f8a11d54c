"""Kernels and optimizers that others make, each an option of the recipe that is off unless it is named.

An option whose package or GPU is missing is refused before weights are loaded; the packages are imported only where an
option is used. May import `pipeline`'s ground.
"""
