"""The documents of dumps, identified by content, so that several dumps can be joined.

Imports of `stage2_student.data` what tells a document's windows and positions."""
