"""Rounds: text by the student, its teacher's dump, and training on it, several times over, as ordinary commands.

Only `pipeline.cli` imports this room; it may import the ground.
"""
