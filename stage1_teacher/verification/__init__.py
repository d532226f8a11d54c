"""Verification of a dump (`bld verify`): its integrity, and whether its teacher still gives the stored targets.

May import every other folder of the stage but `ray`.
"""
