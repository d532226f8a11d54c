"""A stand-in for a teacher's server, over real HTTP."""

import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.tiny import tiny_tokenizer

NUM_TOKENS = 269  # of the tiny tokenizer


class FakeServer:
    """A server that speaks the part of vLLM's protocol that the engine uses.

    Every row lists ids 0 to k - 1 and the token that follows.
    """

    def __init__(self) -> None:
        self.refusals: list[tuple[int, dict[str, str], str]] = []  # answers to the next completions, before good ones
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.under_way = self.max_under_way = 0
        self.card: dict[str, Any] = {"id": "tiny", "max_model_len": 66}
        self.version: dict[str, str] | None = {"version": "0.32.0"}
        self.texts = [str(tiny_tokenizer().decode([token])) for token in range(NUM_TOKENS)]
        self.total = 0.9  # probability of what a row lists
        self.spoil: dict[str, Any] = {}  # fields of a choice, replaced
        self.entry: Callable[[float], Any] | None = None  # what is said of a token, in place of vLLM's form
        self.more: dict[str, Any] = {}  # tokens that each row lists besides
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.requests.append((self.path, dict(self.headers), {}))
                answers = {"/v1/models": {"data": [fake.card]}, "/version": fake.version}
                answer = answers.get(self.path)
                self.answer(404 if answer is None else 200, {}, json.dumps(answer))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append((self.path, dict(self.headers), body))
                    fake.under_way += 1
                    fake.max_under_way = max(fake.under_way, fake.max_under_way)
                    refusal = fake.refusals.pop(0) if fake.refusals else None
                time.sleep(0.01)
                with fake._lock:
                    fake.under_way -= 1
                self.answer(*(refusal or (200, {}, json.dumps({"choices": [fake.choice(body)]}))))

            def answer(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        rows = [{*range(body["prompt_logprobs"]), token} for token in body["prompt"][1:]]
        listing = [{str(i): self.said(i, math.log(self.total / len(ids))) for i in ids} | self.more for ids in rows]
        return {"index": 0, "text": "", "prompt_logprobs": [None, *listing]} | self.spoil

    def said(self, token: int, logprob: float) -> Any:
        if self.entry is not None:
            return self.entry(logprob)
        return {"logprob": logprob, "rank": 1, "decoded_token": self.texts[token]}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
