"""Corpus reading: files as rows, rows as usable documents and chats, and counts of what is left out.

May import `pipeline.sources`, and whatever that may import.
"""
