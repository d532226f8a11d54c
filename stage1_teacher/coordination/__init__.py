"""Coordination of the processes and threads that work on one dump: shard locks, leases, retries, threads.

May import `schemas`, and the parts of `pipeline` that both stages share; knows nothing of what a shard holds.
"""
