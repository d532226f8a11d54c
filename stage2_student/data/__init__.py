"""The data path from the records of dumps to the micro-batches of a rank: join, mix, encode, order, pack.

May import `schemas`, and the parts of `pipeline` that both stages share.
"""
