"""Windows of documents and chats that fit the teacher, with its tokens.

May import `schemas`, and the parts of `pipeline` that both stages share; never `coordination` or `ray`.
"""
