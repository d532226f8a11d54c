"""The ranks of a job: DeepSpeed, which rank this process is, and what ranks tell each other outside collectives.

May import `pipeline`'s ground and `schemas`."""
