"""Coordination of the processes and threads that work on one dump or text corpus: locks, leases, retries, writers.

May import `schemas`, and the parts of `pipeline` that both stages share; only `shard_writers`, which lets processes of
their own write a shard, knows what one holds.
"""
