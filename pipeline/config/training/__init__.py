"""Parts of the train section, one model each.

May import `pipeline.config.section` and `pipeline.runtime`.
"""
