"""The student: loaded, moved to its tokenizer, made smaller, adapted.

May import `data`, `interfaces`, `losses`, `pipeline`'s ground and `schemas`."""
