"""Where the index lies: addresses, older versions, what is not an index, damaged files, and readers and writers in processes of their own."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from composition import Refused
from retrieval import schema
from retrieval.index import Index
from retrieval.rows import Row
from tests.retrieval import fake_s3
from tests.retrieval.random_rows import rows, unit

ROOT = Path(__file__).parents[2]


def tables(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_addresses_that_lancedb_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in (tmp_path / "a", str(tmp_path / "b"), f"file://{tmp_path}/c", "~/d", tmp_path / "deep" / "e"):
        index = Index(uri)
        index.upsert([Row("x", words="owl")])
        assert [hit.id for hit in Index(uri).search(text="owl")] == ["x"]
    assert tables(tmp_path) == ["a", "b", "c", "d", "deep"]
    memory = Index("memory://")
    memory.upsert([Row("x", words="owl", weight=unit(np.random.default_rng(0)))])
    memory.optimise()
    assert memory.search(text="owl")[0].id == "x"


@pytest.mark.parametrize("uri", ["db://cloud", "ftp://a/b", "https://a/b", "hf://datasets/x", "", "FILE"])
def test_other_addresses_are_refused(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("a file")
    with pytest.raises(Refused, match="An index cannot lie at"):
        Index(uri)
    assert tables(tmp_path) == ["FILE"]


@pytest.mark.parametrize(("uri", "storage"), [
    ("s3://bucket/index", {"endpoint": "http://127.0.0.1:9", "aws_access_key_id": "key", "aws_secret_access_key": "SECRET"}),
    ("az://container/index", {}),
])
def test_a_store_that_cannot_be_reached_is_refused_without_its_secrets(monkeypatch, uri, storage):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    quick = {"allow_http": "true", "region": "x", "client_max_retries": "0", "timeout": "1s", "connect_timeout": "1s"}
    with pytest.raises(Refused, match=f"The index at {uri} cannot be used .* Check the address, the network and the credentials") as refusal:
        Index(uri, storage={**storage, **quick} if storage else {})
    assert "SECRET" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_the_same_table_lies_on_object_storage():
    """On as much of S3 as one process can be; a real store was not there to try."""
    some, query = rows(40), {"weight": unit(np.random.default_rng(0))}
    with fake_s3.serving() as (address, objects):
        storage = {"endpoint": address, "allow_http": "true", "region": "here", "aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        index = Index("s3://bucket/some/index", storage=storage)
        index.upsert(some)
        large = Index("s3://bucket/some/index", storage=storage, exact_rows=0)
        large.optimise()
        index.delete([some[0].id])
        hits = index.search(query, "owl dragon", k=100)
        assert [(hit.id, hit.ranks) for hit in hits] == [(hit.id, hit.ranks) for hit in large.search(query, "owl dragon", k=100)] and len(hits) > 20
        assert all(name.startswith("bucket/some/index/loras.lance/") for name in objects)
        assert Index.rebuild("s3://bucket/some/index", storage=storage).count() == 0 == index.count()


def older(folder, some):
    """A table as version 1 had it: what a row says, with vectors in single precision."""
    columns = {"id": [row.id for row in some], "files": [[path.encode() for path in row.files] for row in some], "strength": [row.strength for row in some]}
    columns |= {name: [getattr(row, name) for row in some] for name in ("name", "title", "family", "category", "licence", "words")}
    columns |= {"triggers": [list(row.triggers) for row in some], "updated": [row.updated for row in some], "consistency": pa.nulls(len(some), pa.float64())}
    columns["weight_vec"] = pa.array([None if row.weight is None else row.weight.tolist() for row in some], pa.list_(pa.float32(), 16))
    table = pa.table(columns).replace_schema_metadata({"medley.index": "1"})
    lancedb.connect(folder).create_table("loras", schema=table.schema).add(table, on_bad_vectors="null")


def test_an_older_version_is_brought_up_to_date(tmp_path):
    some = rows(40, seed=3, spaces=("weight",))
    older(tmp_path / "old", some)
    old, new = Index(tmp_path / "old"), Index(tmp_path / "new")
    new.upsert(some)
    query = {"weight": unit(np.random.default_rng(0))}
    for text in ("owl dragons", '"neon"'):
        assert old.search(query, text) == new.search(query, text) != []
    assert schema.version(lancedb.connect(tmp_path / "old").open_table("loras").schema) == schema.VERSION
    old.upsert([Row("more", words="owl", text=query["weight"])])
    assert old.count() == 41 and Index(tmp_path / "old").search({"text": query["weight"]})[0].id == "more"


@pytest.mark.parametrize(("metadata", "reason"), [
    (None, "is not an index of Medley"), ({"other": "1"}, "is not an index of Medley"), ({"medley.index": "soon"}, "is not an index of Medley"),
    ({"medley.index": "99"}, "is of a newer Medley .version 99, this one reads 2."), ({"medley.index": "2"}, "lacks the columns files, name"),
])
def test_what_is_no_index_of_ours_is_refused_and_left_alone(tmp_path, metadata, reason):
    foreign = pa.table({"id": ["precious"]}).replace_schema_metadata(metadata)
    lancedb.connect(tmp_path).create_table("loras", foreign)
    lancedb.connect(tmp_path).create_table("others", foreign)
    with pytest.raises(Refused, match=reason):
        Index(tmp_path)
    assert lancedb.connect(tmp_path).open_table("loras").to_arrow().to_pylist() == [{"id": "precious"}]
    assert Index.rebuild(tmp_path).count() == 0
    assert lancedb.connect(tmp_path).open_table("others").count_rows() == 1


def _cut(folder, size=20):
    for path in folder.iterdir():
        os.truncate(path, size)


def _junk(folder):
    for path in folder.iterdir():
        path.write_bytes(np.random.default_rng(0).bytes(2000))


def _flip(folder):
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 4 : -60 : 7] = bytes(byte ^ 0x5A for byte in data[len(data) // 4 : -60 : 7])
        path.write_bytes(data)


def _as_file(folder):
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")


@pytest.mark.parametrize(("part", "damage"), [
    ("data", shutil.rmtree), ("data", _cut), ("data", _junk), ("data", _flip), ("_versions", _cut), ("_versions", _junk), ("_versions", shutil.rmtree),
    ("_versions", _as_file),
])
def test_damage_is_reported_and_the_index_can_be_rebuilt(tmp_path, part, damage):
    index = Index(tmp_path)
    index.upsert(rows(30))
    damage(tmp_path / "loras.lance" / part)
    if (part, damage) == ("_versions", shutil.rmtree):  # nothing says that there was a table
        assert Index(tmp_path).count() == 0
    else:
        with pytest.raises(Refused, match="The index at .* cannot be used .* rebuild it"):
            Index(tmp_path).search(text="owl dragon")
    index = Index.rebuild(tmp_path)
    assert index.count() == 0
    some = rows(30)
    index.upsert(some)
    index.optimise()
    assert Index(tmp_path).count() == 30 and index.search(text="owl dragon")


def test_whoever_has_the_index_open_goes_on_after_a_rebuild(tmp_path):
    reader = Index(tmp_path)
    reader.upsert([Row("a", words="owl")])
    assert reader.search(text="owl")
    Index.rebuild(tmp_path).upsert([Row("b", words="fox")])
    assert reader.search(text="owl", fuzzy=False) == [] and reader.search(text="fox")[0].id == "b"


WRITER = """
import sys
from retrieval.index import Index
from retrieval.rows import Row
assert "lancedb" not in sys.modules  # slow to import: only what opens an index does
index, name = Index(sys.argv[1]), sys.argv[2]
for number in range(6):
    index.upsert([Row(f"{name}{number}{part}", words=f"owl {name}") for part in "ab"])
index.optimise()
"""


def test_two_processes_write_while_one_reads(tmp_path):
    """Every answer is of one version: both rows of a write, or none. Nothing is lost, nothing is there twice, nothing is printed."""
    index = Index(tmp_path)
    index.upsert([Row("zero0a", words="owl"), Row("zero0b", words="owl")])
    command = [sys.executable, "-c", WRITER, str(tmp_path), "other"]
    writer, writes = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT), 0
    while writer.poll() is None:
        ids = [hit.id for hit in index.search(text="owl", k=100)]
        assert len(set(ids)) == len(ids) and {name[:-1] + part for name in ids for part in "ab"} == set(ids) != set()
        if writes < 6 and len(ids) > 2:  # while the other is writing too
            writes += 1
            index.upsert([Row(f"own{writes}{part}", words="owl own") for part in "ab"])
        time.sleep(0.02)
    assert writer.communicate()[0] == b""
    assert index.count() == 14 + 2 * writes == len(index.search(text="owl", k=100))
