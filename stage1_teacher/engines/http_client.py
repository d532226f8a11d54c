"""An HTTP client that sends many requests at a time and retries while the server is busy or unreachable."""

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from pipeline.config import PlacementConfig
from pipeline.runtime import log
from pipeline.runtime.format import count_of
from pipeline.runtime.metrics import count_failure

KEY_VARIABLE = "BLD_API_KEY"  # not OPENAI_API_KEY, which is for another host
FIRST_WAIT = 0.5  # seconds before the second attempt; each further wait is twice as long
LONGEST_WAIT = 60.0
RETRIED = (408, 429, 500, 502, 503, 504)
Answer = TypeVar("Answer")


class _TryAgainError(Exception):
    """The server is busy or unreachable; `wait` is the delay that it requests, seconds."""

    def __init__(self, fault: str, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.wait = wait


class Server:
    """One HTTP server, retried while busy or unreachable. The API key goes into one header and nowhere else."""

    def __init__(self, placement: PlacementConfig) -> None:
        assert placement.base_url is not None  # Recipe checks it
        self.base_url = placement.base_url
        self._attempts, self._requests = placement.request_attempts, placement.requests
        self._key = _api_key()
        self._runner = asyncio.Runner()
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(placement.request_timeout, connect=min(30.0, placement.request_timeout), pool=None),
            limits=httpx2.Limits(max_connections=placement.requests),
        )

    def get(self, url: str, missing_is_none: bool = False) -> Any:
        """Return the JSON at an address; with `missing_is_none`, None if the server does not know the address."""
        return self._runner.run(self._ask("GET", url, None, missing_is_none))

    def post_all(self, url: str, bodies: Sequence[dict[str, Any]], read: Callable[[int, Any], Answer]) -> list[Answer]:
        """Post each body, and return what `read` makes of its index and JSON response; the first failure ends all."""
        return self._runner.run(self._post_all(url, bodies, read))

    async def _post_all(
        self, url: str, bodies: Sequence[dict[str, Any]], read: Callable[[int, Any], Answer]
    ) -> list[Answer]:
        slots = asyncio.Semaphore(self._requests)

        async def post(index: int) -> Answer:
            async with slots:
                return read(index, await self._ask("POST", url, bodies[index]))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(post(index)) for index in range(len(bodies))]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, method: str, url: str, body: dict[str, Any] | None, missing_is_none: bool = False) -> Any:
        """Return the response, with retries. Raises ConnectionError when no attempts are left."""
        fault = ""
        for attempt in range(1, self._attempts + 1):
            try:
                return await self._ask_once(method, url, body, missing_is_none)
            except _TryAgainError as error:
                fault, asked_wait = str(error), error.wait
            if attempt < self._attempts:
                # Jitter: otherwise requests that a busy server refused together would come back together.
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                wait = max(wait, min(asked_wait, LONGEST_WAIT))
                again = f"attempt {attempt + 1} of {self._attempts} in {wait:.1f} s"
                count_failure("request")
                log.warning(f"{method} {url}: {fault}; {again}")
                await asyncio.sleep(wait)
        raise ConnectionError(
            f"{method} {url} failed {count_of(self._attempts, 'time')}; last error: {fault}. Check that the server "
            "runs and that placement.base_url is its address; lower placement.requests if it is overloaded. Then rerun "
            "the same command: completed shards are kept."
        )

    async def _ask_once(self, method: str, url: str, body: dict[str, Any] | None, missing_is_none: bool) -> Any:
        try:
            response = await self._client.request(method, url, json=body)
        except httpx2.RequestError as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
        if response.status_code == 200:
            return self._json(url, response)
        if missing_is_none and response.status_code in (404, 405):
            return None
        fault = f"status {response.status_code}: {self._excerpt(response.text)}"
        if response.status_code in RETRIED:
            raise _TryAgainError(fault, _retry_after(response))
        raise ValueError(f"{method} {url}: {fault}. {self._remedy(response)}")

    def _json(self, url: str, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise ValueError(
                f"{url} returned something that is not JSON: {self._excerpt(response.text)}. "
                "Check placement.base_url; it usually ends in /v1."
            ) from None

    def _excerpt(self, text: str) -> str:
        """Return the start of a body, on one line, without the key: some servers repeat the key that they refuse."""
        text = text.replace(self._key, f"[{KEY_VARIABLE}]") if self._key else text
        return " ".join(text.split())[:300] or "empty body"

    def _remedy(self, response: httpx2.Response) -> str:
        if response.status_code in (401, 403):
            given = "is not accepted" if self._key else "is not set"
            return f"The server requires a key, and the environment variable {KEY_VARIABLE} {given}."
        if "logprobs" in response.text:
            return "Start the server with --max-logprobs of teacher.prompt_logprobs or more, or lower the latter."
        return "Check placement.base_url (it usually ends in /v1), and the server's log."

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


def _api_key() -> str:
    """Return the environment's key, or "". Raises ValueError, without the key, for one that no header can hold."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {KEY_VARIABLE} holds characters that no key has; set it again")
    return key


def _retry_after(response: httpx2.Response) -> float:
    """Return the delay that the server requests, in seconds; 0 if it gives none, or a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
