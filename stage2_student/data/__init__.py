"""From the records of dumps to the micro-batches of a rank: joined, mixed, encoded, ordered, packed.

May import `pipeline`'s ground and `schemas`."""
