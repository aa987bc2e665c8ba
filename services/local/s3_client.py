"""Reads and writes S3 the way any AWS client does, for what is done on one host: listing adapters, copying them in."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_URI = re.compile(r"s3://(?P<bucket>[A-Za-z0-9._-]+)(?:/(?P<prefix>.*))?")


@dataclass(frozen=True)
class S3Place:
    """A bucket and a prefix in it; the prefix is empty or ends with a slash."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Place:
        """`s3://bucket/prefix`; ValueError for anything else."""
        found = _URI.fullmatch(uri)
        if found is None:
            raise ValueError(f"{uri} is not of the form s3://bucket/prefix")
        prefix = (found["prefix"] or "").strip("/")
        return cls(found["bucket"], f"{prefix}/" if prefix else "")

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix/`."""
        return f"s3://{self.bucket}/{self.prefix}"

    def below(self, name: str) -> S3Place:
        """The place one level down."""
        return S3Place(self.bucket, f"{self.prefix}{name}/")


def named_endpoint(environment: Mapping[str, str]) -> str | None:
    """The URL of the S3 service that the environment names; None is AWS itself."""
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")


class S3Client:
    """An S3 service named by the environment variables of AWS clients (endpoint, keys, region)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=named_endpoint(environment),
            aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=environment.get("AWS_SESSION_TOKEN"),
            region_name=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"max_attempts": 2},
                # Not every S3 service computes the checksums that AWS's own does.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def adapters_below(self, place: S3Place) -> dict[str, S3Place]:
        """Every adapter directly below `place`, by its last path element: sub-prefixes that hold both files."""
        found: dict[str, set[str]] = {}
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=place.prefix):
            for entry in page.get("Contents", ()):
                name, _, file = entry["Key"].removeprefix(place.prefix).partition("/")
                if file in ADAPTER_FILES:
                    found.setdefault(name, set()).add(file)
        return {name: place.below(name) for name, files in sorted(found.items()) if len(files) == len(ADAPTER_FILES)}

    def make_bucket(self, name: str) -> None:
        """Makes sure that the bucket exists."""
        with contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
            self._client.create_bucket(Bucket=name)

    def put_adapter(self, directory: Path, place: S3Place) -> None:
        """Copies an adapter's two files to `place`."""
        for file in ADAPTER_FILES:
            self._client.upload_file(str(directory / file), place.bucket, place.prefix + file)
