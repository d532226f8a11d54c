"""Stored token counts of a whole dump as arrays, in memory or mapped from files that a machine's ranks share.

Imports of `stage2_student.data` what counts and cuts records."""
