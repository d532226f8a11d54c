"""Calibration: a minute of dumping a random sample, to forecast the whole dump.

May import every other folder of the stage but `ray`.
"""
