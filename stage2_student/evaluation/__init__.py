"""Evaluation of models: bits per byte, divergence to a dump, tasks.

May import `data`, `interfaces`, `model`, `schemas`, and the parts of `pipeline` that both stages share.
"""
