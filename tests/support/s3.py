"""An S3 server of our own, for tests: moto's, in a thread of this process."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

_BUCKETS = itertools.count()


class Store:
    """A server and its address."""

    def __init__(self, port: int) -> None:
        self.port = port

    def address(self, folder: str = "run") -> str:
        """A folder in a bucket of its own."""
        bucket = f"bucket-{next(_BUCKETS)}"
        self.client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1")


@contextmanager
def server() -> Iterator[Store]:
    """Serve while the block runs; keys are in the environment, as for the real one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name, value in (("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true")):
            patch.setenv(name, value)
        patch.setenv("NO_PROXY", "127.0.0.1")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        made.start()
        try:
            yield Store(made.get_host_and_port()[1])
        finally:
            made.stop()
