"""Windows of documents and chats that fit the teacher, with its tokens.

May import `pipeline`'s ground and `schemas`; never `coordination` or `ray`."""
