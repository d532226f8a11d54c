"""How several processes and threads work on one dump: shard locks, leases, retries.

May import `pipeline`'s ground and `schemas`; knows nothing of what a shard holds."""
