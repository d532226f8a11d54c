"""Locations of dumps, local folders or object stores, and atomic writes to them: a file is absent or complete.

Imports nothing of the project but `schemas`."""
