"""An S3 server on this machine, for tests of sources behind `s3://`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def serving_s3(bucket: str) -> Iterator[pytest.MonkeyPatch]:
    """A server with one empty bucket, which the environment points to: as for every user, it names endpoint and credentials."""
    s3fs = pytest.importorskip("s3fs", reason="needs the package s3fs (axolotl[s3])")
    pytest.importorskip("flask", reason="needs the package moto[server]")
    server = pytest.importorskip("moto.server", reason="needs the package moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in values.items():
            environment.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(bucket)
        yield environment
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
