"""Engines of this machine, each in a process of its own, and the queue that assigns shards to engines elsewhere.

May import every other folder of the stage but `ray`, `verification` and `calibration`.
"""
