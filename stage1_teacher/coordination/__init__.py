"""Coordination of the processes and threads that work on one dump: shard locks, leases, retries, threads.

May import `pipeline`'s ground and `schemas`; knows nothing of what a shard holds."""
