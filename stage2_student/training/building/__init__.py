"""The student of a run, built from its start.

May import every folder of the stage except `launch`.
"""
