"""Documents of one length, cut from a recipe's corpus, on which the modes of a dump are timed."""

import copy


class Task:
    """Documents of about `num_tokens` teacher tokens for all modes.

    They are cut from the recipe's corpus joined together.
    """

    def __init__(self, recipe_path: str, dtype: str, num_documents: int, num_tokens: int) -> None:
        from pipeline.config.loading import load_recipe
        from pipeline.corpus.documents import Corpus
        from pipeline.sources.resolve import resolve_model
        from pipeline.tokenization.byte_tokenizer import ByteTokenizer

        self.recipe = load_recipe(
            recipe_path,
            ["corpus.limit=2000", "teacher.max_tokens=1024", f"teacher.dtype={dtype}", "placement.batch_tokens=2048"],
        )
        self.model = resolve_model(self.recipe.teacher.model).source
        self.tokenizer = ByteTokenizer.load(self.model)
        text = "\n\n".join(d.text.decode() for d in Corpus(self.recipe.corpus).documents())
        size = int(num_tokens * 4.3)
        self.texts = [text[i * size : (i + 1) * size].encode() for i in range(min(num_documents, len(text) // size))]
        self.prompts = [[0, *self.tokenizer.encode(text)][:1023] for text in self.texts]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts))

    def small(self) -> "Task":
        """Return two documents to warm up on."""
        small = copy.copy(self)
        small.texts, small.prompts = self.texts[:2], self.prompts[:2]
        return small
