"""The dump as a whole: planned, made shard by shard, audited, finished; extended and merged.

May import every other folder of the stage but `ray`, `verification` and `calibration`.
"""
