"""Where the user's adapters come from: a directory of them, or a prefix in S3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from slora_client import AdapterClient, SloraRequestError

from services.local.checkpoint import BadInput
from services.local.s3_client import ADAPTER_FILES, S3Client, S3Place

_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class AdapterSource:
    """Adapters by name: directories to upload, or places in S3 to register."""

    directories: Mapping[str, Path]
    places: Mapping[str, S3Place]
    s3_place: S3Place | None = None
    """The S3 prefix that was named, if one was."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return (*self.directories, *self.places)


def find_adapters(named: str, environment: Mapping[str, str]) -> AdapterSource:
    """The adapters in `named`, a directory or `s3://bucket/prefix`; BadInput, one line, if there are none to be had.

    An adapter is named after its directory or last prefix. `environment` says where S3 is, the AWS way.
    """
    if named.startswith("s3://"):
        return _find_in_s3(named, environment)
    directory = Path(named)
    if not directory.is_dir():
        raise BadInput(f"{named} is neither a directory nor s3://bucket/prefix")
    if (directory / ADAPTER_FILES[0]).is_file():
        return AdapterSource({directory.resolve().name: directory}, {})
    found = {path.name: path for path in sorted(directory.iterdir()) if (path / ADAPTER_FILES[0]).is_file()}
    if not found:
        raise BadInput(f"{named} has no adapters: no subdirectory of it has an {ADAPTER_FILES[0]}")
    return AdapterSource(found, {})


def bring_adapters(source: AdapterSource, store_address: str, on_done: Callable[[str, str], None]) -> None:
    """Uploads or registers every adapter.

    `on_done(name, refusal)` is called for each; the refusal is empty for one that was taken. Those that the store has
    already are taken at once.
    """
    with AdapterClient(store_address) as store:
        for name in source.names:
            refusal = ""
            try:
                if name in source.directories:
                    store.upload(name, source.directories[name], timeout=_TIMEOUT_SECONDS)
                else:
                    store.register(name, source.places[name].uri, timeout=_TIMEOUT_SECONDS)
            except (SloraRequestError, OSError, ValueError) as error:
                refusal = str(error)
            on_done(name, refusal)


def count_others(store_address: str, names: Collection[str]) -> int:
    """How many adapters the store has besides `names`."""
    with AdapterClient(store_address) as store:
        return len({entry.name for entry in store.list()}.difference(names))


def _find_in_s3(named: str, environment: Mapping[str, str]) -> AdapterSource:
    try:
        place = S3Place.parse(named)
        found = S3Client(environment).adapters_below(place)
    except ValueError as error:
        raise BadInput(str(error)) from None
    except (BotoCoreError, ClientError) as error:
        raise BadInput(f"{named} cannot be listed: {error}") from None
    if not found:
        raise BadInput(f"{named} has no adapters: nothing right below it has {' and '.join(ADAPTER_FILES)}")
    return AdapterSource({}, found, place)
