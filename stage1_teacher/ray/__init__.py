"""Engines on the machines of a Ray cluster, and the queue that assigns shards to them.

May import every other folder of the stage but `verification` and `calibration`.
"""
