"""Where a dump lies, folder or object store, and how its files appear there: absent or complete.

Imports nothing of the project but `schemas`."""
