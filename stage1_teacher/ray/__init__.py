"""Engines on the machines of a Ray cluster.

May import every other room of the stage but `verification` and `calibration`."""
