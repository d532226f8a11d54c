"""The engine on a server: `vllm serve`, queried over HTTP for the most probable tokens of every row of a prompt.

`POST /completions` takes token ids. With `prompt_logprobs`, vLLM's extension of OpenAI's protocol, it lists, for each
prompt token but the first, the most probable tokens of the row before it, by id, and that token itself. The last row
needs one more token after it, a sentinel: an END token, so that the row lists END whether or not it is probable.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.covering.truncated_rows import ListedRows
from pipeline.runtime import log
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import EngineRequest
from stage1_teacher.engines.http_client import Server

PROBE = b"The teacher's tokens, in a few words: 1, 2 and 3."
EXTRA_TOKENS = 2  # the sentinel, and one generated token, which vLLM requires
# For each prompt token but the first: {id: {"logprob": nats, "rank": from 1, "decoded_token": text}}, ids as text.
Listing = list[dict[str, dict[str, Any]]]
Answer = TypeVar("Answer")


def check_server(server: Server, teacher: TeacherConfig) -> str:
    """Check the server and return the engine's name for the dump's identity: `openai-vllm-0.32.0`.

    The name has no version if the server gives none.

    Raises:
        ValueError: the server has no such model, or serves it with too short a context.
    """
    model = teacher.name_at_server
    longest, needed = _longest_prompt(server, model), teacher.max_tokens + EXTRA_TOKENS
    if longest is not None and longest < needed:
        raise ValueError(
            f"{server.base_url} serves {model!r} with max_model_len {longest}, and windows of teacher.max_tokens "
            f"{teacher.max_tokens} need {needed} ({EXTRA_TOKENS} more). Give teacher.max_tokens="
            f"{longest - EXTRA_TOKENS} or less, or start the server with --max-model-len {needed}."
        )
    version = server.get(server.base_url.removesuffix("/v1") + "/version", missing_is_none=True)
    number = version.get("version") if isinstance(version, dict) else None
    return f"openai-vllm-{number}" if number else "openai-vllm"


def _longest_prompt(server: Server, model: str) -> int | None:
    """Return the served model's max_model_len; None if the server gives none.

    Raises ValueError if it has no such model.
    """
    url = f"{server.base_url}/models"
    answer = server.get(url)
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list):
        raise ValueError(f"{url} lists no models. Check placement.base_url; it usually ends in /v1.")
    served = {card.get("id"): card for card in cards}
    if model not in served:
        raise ValueError(
            f"{server.base_url} serves no model {model!r}; it serves {', '.join(map(repr, served)) or 'none'}. "
            "Give its name there (teacher.served_model), or another placement.base_url."
        )
    longest: int | None = served[model].get("max_model_len")
    return longest


def longest_window(teacher: TeacherConfig, placement: PlacementConfig) -> int | None:
    """Return the maximum window that the server accepts, in tokens; None if it gives none.

    Raises as `check_server` does.
    """
    server = Server(placement)
    try:
        longest = _longest_prompt(server, teacher.name_at_server)
    finally:
        server.close()
    return None if longest is None else longest - EXTRA_TOKENS


def engine_name(teacher: TeacherConfig, placement: PlacementConfig) -> str:
    """Check the server as `check_server` does, over a connection of its own, and return the engine's name."""
    server = Server(placement)
    try:
        return check_server(server, teacher)
    finally:
        server.close()


def make_engine(request: EngineRequest) -> "OpenAIEngine":
    """Connect to the server and check it."""
    return OpenAIEngine(request.teacher, request.placement, request.tokenizer, request.start, request.ends[0])


class OpenAIEngine:
    """A teacher behind a server, checked before it is used: name, context, prompt log-probabilities, tokenizer.

    Args:
        start: id put before a document, or None.
        sentinel: id put after every prompt; one that means END.
    Raises:
        ValueError: the server is not the teacher that the recipe describes; says what to change.
        ConnectionError: the server cannot be reached, or is busy for too long.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        placement: PlacementConfig,
        tokenizer: ByteTokenizer,
        start: int | None,
        sentinel: int,
    ) -> None:
        self._teacher, self._sentinel, self._num_tokens = teacher, sentinel, len(tokenizer.token_bytes)
        # vLLM 0.32 does not refuse this: its engine dies.
        if teacher.prompt_logprobs > self._num_tokens:
            raise ValueError(
                f"teacher.prompt_logprobs is {teacher.prompt_logprobs}, and the tokenizer has {self._num_tokens} "
                "tokens; give at most that"
            )
        self._server = Server(placement)
        self._url = f"{self._server.base_url}/completions"
        try:
            self.name = check_server(self._server, teacher)
            self._check_spelling(tokenizer, start)
        except BaseException:
            self._server.close()
            raise

    def listed_rows(self, prompts: Sequence[Sequence[int]]) -> list[ListedRows]:
        """Return the rows of each prompt of token ids; row r is for what follows the first r + 1 tokens."""
        return self._ask(prompts, self._rows)

    def _ask(self, prompts: Sequence[Sequence[int]], read: Callable[[Listing], Answer]) -> list[Answer]:
        common = {
            "model": self._teacher.name_at_server,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self._teacher.prompt_logprobs,
        }
        ended = [[*prompt, self._sentinel] for prompt in prompts]
        # Each answer is reduced as it arrives, because a token's entry is a dictionary of three.
        return self._server.post_all(
            self._url,
            [common | {"prompt": prompt} for prompt in ended],
            lambda index, answer: read(self._listing(ended[index], answer)),
        )

    def _listing(self, prompt: Sequence[int], answer: Any) -> Listing:
        """Return an answer's prompt log-probabilities. Raises ValueError if they are not those of the prompt."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        listing = first.get("prompt_logprobs") if isinstance(first, dict) else None
        if not isinstance(listing, list) or not listing:
            raise ValueError(
                f"{self._url} answers without prompt_logprobs. The teacher must be served by vLLM (`vllm serve`), and "
                "any proxy in between must pass through vLLM's extra fields."
            )
        if len(listing) != len(prompt):
            raise ValueError(
                f"{self._url} lists {len(listing)} tokens for a prompt of {len(prompt)}: the server cuts or extends "
                "prompts"
            )
        for token, entries in zip(prompt[1:], listing[1:], strict=True):
            if not isinstance(entries, dict) or not all(map(_is_entry, entries.items())):
                raise ValueError(
                    f"{self._url} lists tokens in another form than vLLM's, {{id: {{logprob, ...}}}}: "
                    f"{str(entries)[:100]}. The teacher must be served by vLLM (`vllm serve`)"
                )
            if str(token) not in entries:
                raise ValueError(f"{self._url} lists no token {token} where the prompt has it: it changes prompts")
            if len(entries) < self._teacher.prompt_logprobs:
                raise ValueError(
                    f"{self._url} lists {len(entries)} tokens of a row where teacher.prompt_logprobs requests "
                    f"{self._teacher.prompt_logprobs}; start the server with a larger --max-logprobs, or lower it"
                )
        return listing[1:]

    def _rows(self, listing: Listing) -> ListedRows:
        counts_R = np.array([len(entries) for entries in listing], dtype=np.int64)
        token_ids_E = np.array([int(token) for entries in listing for token in entries], dtype=np.int64)
        logprobs_E = np.array([entry["logprob"] for entries in listing for entry in entries.values()], dtype=np.float64)
        masses_R = np.add.reduceat(np.exp(np.minimum(logprobs_E, 1.0)), np.cumsum(counts_R) - counts_R)
        # float32 log-probabilities of a whole vocabulary sum to 1 within 1e-5; logits do not. The k most probable
        # tokens of a row have at least the share k / vocabulary; half of it allows for a head's padding rows.
        min_mass = 0.5 * self._teacher.prompt_logprobs / self._num_tokens
        outside = [float(mass) for mass in (masses_R.min(), masses_R.max()) if not min_mass <= mass < 1.001]
        if outside:
            raise ValueError(
                f"{self._url}: the probabilities of a row's {self._teacher.prompt_logprobs} most probable tokens sum "
                f"to {outside[0]:.4g} ({min_mass:.2g} to 1 is possible), so they are not log-probabilities; start the "
                "server without --logprobs-mode, or with raw_logprobs"
            )
        return ListedRows(counts_R, token_ids_E, logprobs_E, self._teacher.prompt_logprobs)

    def _check_spelling(self, tokenizer: ByteTokenizer, start: int | None) -> None:
        """Raise ValueError if the server's texts of tokens are not the tokenizer's: its ids would mean other text."""
        prompt = [*([] if start is None else [start]), *tokenizer.encode(PROBE)][: self._teacher.max_tokens]
        [listing] = self._ask([prompt], lambda listing: listing)
        self._rows(listing)
        compared, wrong = 0, []
        for token, entry in ((int(token), entry) for entries in listing for token, entry in entries.items()):
            theirs, ours = entry.get("decoded_token"), _text(tokenizer, token)
            # Half a character has no text; spaces at the ends depend on how a token is displayed.
            if ours and theirs and "\ufffd" not in theirs:
                compared += 1
                if theirs.strip() != ours.strip():
                    wrong.append(f"token {token} is {theirs!r} there and {ours!r} here")
        if 2 * len(wrong) > compared:
            raise ValueError(
                f"{self._server.base_url} serves {self._teacher.name_at_server!r} with another tokenizer: "
                f"{'; '.join(wrong[:3])}. Give the served model's tokenizer (teacher.tokenizer)."
            )
        if not compared:
            log.warning(
                f"{self._server.base_url} gives no texts of tokens, so whether its tokenizer is the recipe's is not "
                "checked"
            )

    def close(self) -> None:
        self._server.close()


def _is_entry(listed: tuple[str, Any]) -> bool:
    """Return whether a token's id and its entry have vLLM's form."""
    token, entry = listed
    return token.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("logprob"), int | float)


def _text(tokenizer: ByteTokenizer, token: int) -> str | None:
    """Return a token's bytes as text; None if it has none, or they are not whole characters."""
    spelled = tokenizer.token_bytes[token] if token < len(tokenizer.token_bytes) else None
    try:
        return None if spelled is None else spelled.decode("utf-8")
    except UnicodeDecodeError:
        return None
