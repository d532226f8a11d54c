"""The terms of the loss, by name.

May import `data`, `interfaces`, `schemas`, and the parts of `pipeline` that both stages share.
"""
