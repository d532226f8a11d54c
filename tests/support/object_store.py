"""An S3-compatible server on loopback, in a process of its own.

vLLM inspects all loaded modules, and fails on Flask's.
"""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

SECRET = "a-secret-that-nobody-may-see"
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()  # until the test is over, or gone
"""


class ObjectStore(NamedTuple):
    """A bucket, and the environment variables for reaching it."""

    address: str
    environment: dict[str, str]
    filesystem: fs.S3FileSystem

    def put(self, folder: Path, name: str) -> str:
        """Copy a folder into the bucket; its address there."""
        fs.copy_files(
            str(folder),
            f"bucket/{name}",
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.filesystem,
            use_threads=False,
        )
        return f"{self.address}/{name}"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server with one empty bucket while the context lasts."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        host, port = server.stdout.readline().split()
        try:
            yield open_bucket(f"{host}:{port}")
        finally:
            server.stdin.close()


@contextmanager
def cut_off(store: ObjectStore, request: bytes, after_bytes: int) -> Iterator[tuple[dict[str, str], threading.Event]]:
    """Open a way to the store on which a request with such a head stalls after its first bytes.

    Yields:
        The environment by which the store is reached on that way, and an event: that the request hangs.
    """
    host, _, port = store.environment["AWS_ENDPOINT_URL"].removeprefix("http://").rpartition(":")
    reached, over = threading.Event(), threading.Event()

    def forward(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as server:
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            seen = b""
            while data := client.recv(1 << 16):
                seen = (seen + data)[-(1 << 16) :]
                at = seen.find(request)
                if at >= 0 and len(seen) - at > after_bytes:
                    server.sendall(data[: len(data) - (len(seen) - at - after_bytes)])
                    reached.set()
                    over.wait()
                    return
                server.sendall(data)

    def listen(listener: socket.socket) -> None:
        while not over.is_set():
            with suppress(TimeoutError):
                threading.Thread(target=forward, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        thread = threading.Thread(target=listen, args=(listener,))
        thread.start()
        try:
            yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}, reached
        finally:
            over.set()
            thread.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def open_bucket(endpoint: str) -> ObjectStore:
    """Make the bucket of a server at `host:port`."""
    filesystem = fs.S3FileSystem(
        access_key="key",
        secret_key=SECRET,
        region="us-east-1",
        scheme="http",
        endpoint_override=endpoint,
        allow_bucket_creation=True,
    )
    filesystem.create_dir("bucket")
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{endpoint}",
    }
    return ObjectStore("s3://bucket", environment, filesystem)
