"""The corpus: files read as rows, rows as usable documents and chats, and a count of what is left out.

May import what `pipeline.sources` may, and that."""
