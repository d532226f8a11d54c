"""The ranks of a job: DeepSpeed, the rank of this process, and messages between ranks outside collectives.

May import `pipeline`'s ground and `schemas`."""
