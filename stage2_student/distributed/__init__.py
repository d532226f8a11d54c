"""The ranks of a job: DeepSpeed, the rank of this process, and messages between ranks outside collectives.

May import `pipeline`'s ground, `schemas`, and `stage2_student.data`, whose records the ranks pass to each other."""
