"""Where the index lies: its address, its table opened, made, brought up to date or erased, and what goes wrong there in plain words."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from composition.refusal import Refused
from retrieval import schema

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

TABLE = "loras"
STORES = ("file", "memory", "s3", "gs", "az")  # what LanceDB reaches without a service of its own
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{1,30})://", re.IGNORECASE)
_SOURCE_LINE = re.compile(r",? ?/\S{1,200}\.rs:\d{1,7}:\d{1,7}")  # where in LanceDB's own code


def address(uri: str | Path) -> str:
    """The address in LanceDB's spelling. Raises Refused for what is neither a folder nor a store that an index can lie in."""
    text = os.path.expanduser(os.fspath(uri))
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() not in STORES:
        raise Refused(f"An index cannot lie at {text!r}: give a folder, or an address that begins with {', '.join(f'{name}://' for name in STORES)}")
    if not text or (not scheme and os.path.lexists(text) and not os.path.isdir(text)):
        raise Refused(f"An index cannot lie at {text!r}: that is not a folder")
    return text


def remote(uri: str) -> bool:
    return bool((scheme := _SCHEME.match(uri)) and scheme[1].lower() != "file")


def connect(uri: str, storage: Mapping[str, str] | None) -> DBConnection:
    """LanceDB at that address; each read sees what was last written, by whomever."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are for its own developers
    import lancedb  # slow, and only needed by what searches

    return lancedb.connect(uri, read_consistency_interval=timedelta(0), storage_options=dict(storage or {}))


def opened(connection: DBConnection, uri: str) -> Table:
    """The table, made where there is none, written again where it is an older version's. Raises Refused for what is no index of ours."""
    try:
        table = connection.open_table(TABLE)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        return connection.create_table(TABLE, schema=schema.schema({}), exist_ok=True)
    if schema.outdated(table.schema, uri):
        present = schema.migrated(table.to_arrow())
        table = connection.create_table(TABLE, present, mode="overwrite", on_bad_vectors="null")  # one step: never half a table
    return table


def erase(uri: str, storage: Mapping[str, str] | None) -> None:
    """Leave an empty table, or none, under the index's name. Whoever has a sound table open goes on with the empty one."""
    with plainly(uri):
        connection = connect(uri, storage)
        with suppress(RuntimeError, ValueError, OSError):
            connection.create_table(TABLE, schema=schema.schema({}), mode="overwrite")
            if not connection.open_table(TABLE).to_arrow().num_rows:
                return
        with suppress(RuntimeError, ValueError, OSError):
            connection.drop_table(TABLE)
        if not remote(uri):
            left = Path(connection.uri, f"{TABLE}.lance")
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def plainly(uri: str) -> Iterator[None]:
    """What LanceDB or the disk refuses, said in the user's words."""
    import pyarrow as pa

    try:
        yield
    except Refused:
        raise
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        reason = " ".join(_SOURCE_LINE.sub("", str(error)).split())[:160]
        advice = "Check the address, the network and the credentials" if remote(uri) else "If its files are damaged, rebuild it: nothing but time is lost"
        raise Refused(f"The index at {uri} cannot be used ({reason}). {advice}") from error
