"""Runtime support for every command: log, progress, termination, child processes, devices, dtypes, model loading.

May import nothing else of the project except `schemas`.
"""
