"""An S3-compatible server on loopback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moto.server import ThreadedMotoServer
from pyarrow import fs

SECRET = "a-secret-that-nobody-may-see"


class ObjectStore(NamedTuple):
    """A bucket, and the environment variables by which it is reached."""

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
    """A server with one empty bucket, while the context lasts."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    filesystem = fs.S3FileSystem(
        access_key="key",
        secret_key=SECRET,
        region="us-east-1",
        scheme="http",
        endpoint_override=f"{host}:{port}",
        allow_bucket_creation=True,
    )
    filesystem.create_dir("bucket")
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:
        yield ObjectStore("s3://bucket", environment, filesystem)
    finally:
        server.stop()
