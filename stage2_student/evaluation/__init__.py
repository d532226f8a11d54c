"""Models measured: bits per byte, divergence to a dump, tasks.

May import `data`, `interfaces`, `model`, `pipeline`'s ground and `schemas`."""
