"""What a running command stands on: its log and progress, its end, its child processes, the arithmetic of its machine,
models from disk.

Imports nothing of the project but this room.
"""
