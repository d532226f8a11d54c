"""Engines on the machines of a Ray cluster.

May import every other folder of the stage but `verification` and `calibration`.
"""
