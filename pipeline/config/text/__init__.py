"""Sections on the text itself: the part of it that is learned, and text that a model writes.

May import `pipeline.config.section`, and whatever that may import.
"""
