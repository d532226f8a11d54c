"""Text that the teacher or the student writes (`bld generate`): prompts, sampling, and the corpus that holds it.

May import `engines`, `targets`, `coordination` and `dump`, and whatever they may import; never `processes` or `ray`.
"""
