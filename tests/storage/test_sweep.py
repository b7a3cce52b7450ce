"""What no listing shows: half-written files, unfinished uploads, what a store keeps of objects that were replaced."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
import redis

from storage.local import LocalObjects
from storage.objects import Objects, open_objects
from storage.retention import prune
from tests.servers import RedisServer, S3Server


def test_nothing_to_sweep(objects: Objects) -> None:
    objects.put("users/local/alice/HEAD", b"1")
    assert objects.sweep(older_than_s=0.0) == []
    assert objects.sweep("users/local/alice/", older_than_s=0.0) == []
    assert objects.sweep("users/local/nobody/", older_than_s=0.0) == []
    found = objects.get("users/local/alice/HEAD")
    assert found is not None
    assert found[0] == b"1"


@pytest.fixture
def folder(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "store")


def test_half_written_files_go_and_with_them_the_folder(folder: LocalObjects) -> None:
    folder.put("users/local/alice/HEAD", b"1")
    folder.put("users/local/bob/HEAD", b"1")
    left = folder.root / "users/local/alice/.write-0123456789abcdef"
    left.write_bytes(b"half of a memory")
    (folder.root / "users/local/bob/.write-0123456789abcdef").write_bytes(b"half of bob's")
    folder.delete("users/local/alice/HEAD")
    assert left.exists(), "a deletion does not look for it"
    assert folder.sweep("users/local/alice/", older_than_s=0.0) == [left.name]
    assert not left.parent.exists()
    assert len(list((folder.root / "users/local/bob").iterdir())) == 2


def test_copies_of_living_writers_stay(folder: LocalObjects) -> None:
    copies = folder.root / ".copies"
    copies.mkdir(parents=True)
    (copies / ".copy-dead").write_bytes(b"a part")
    with open(copies / ".copy-alive", "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"a part")
        file.flush()
        assert folder.sweep(older_than_s=3600.0) == [], "all are young"
        then = time.time() - 7200
        for path in copies.iterdir():
            os.utime(path, (then, then))
        assert folder.sweep(older_than_s=3600.0) == [".copy-dead"]
    assert folder.sweep(older_than_s=3600.0) == [".copy-alive"], "its writer has gone"


def test_unfinished_uploads_go(s3_server: S3Server, s3_url: str) -> None:
    objects = open_objects(s3_url)
    prefix = s3_url.partition("titanmem/")[2].partition("?")[0]
    client = boto3.client("s3", endpoint_url=s3_server.endpoint, region_name="us-east-1")
    for name in ("snapshot/part", "other/part"):
        begun = client.create_multipart_upload(Bucket="titanmem", Key=f"{prefix}/{name}")
        client.upload_part(
            Bucket="titanmem",
            Key=f"{prefix}/{name}",
            UploadId=begun["UploadId"],
            PartNumber=1,
            Body=b"x" * 100,
        )
    assert list(objects.list()) == []
    assert objects.sweep(older_than_s=3600.0) == []
    assert objects.sweep("snapshot/", older_than_s=0.0) == ["snapshot/part (unfinished upload)"]
    left = client.list_multipart_uploads(Bucket="titanmem", Prefix=prefix)["Uploads"]
    assert [line["Key"] for line in left] == [f"{prefix}/other/part"]
    prune(objects, now=datetime.now(UTC))
    assert len(client.list_multipart_uploads(Bucket="titanmem", Prefix=prefix)["Uploads"]) == 1, (
        "it may still run"
    )
    prune(objects, now=datetime.now(UTC), sweep_age_s=0.0)
    assert "Uploads" not in client.list_multipart_uploads(Bucket="titanmem", Prefix=prefix)


def test_older_versions_of_a_versioned_bucket_go(s3_server: S3Server) -> None:
    client = boto3.client("s3", endpoint_url=s3_server.endpoint, region_name="us-east-1")
    s3_server.make_bucket("versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    objects = open_objects(s3_server.url("versioned", "store"))
    for content in (b"one", b"two", b"three"):
        objects.put("users/local/alice/HEAD", content)
        objects.put("users/local/bob/HEAD", content)
    objects.delete("users/local/alice/HEAD")
    assert objects.sweep("users/local/alice/", older_than_s=0.0) == [], "only when it is asked for"
    removed = objects.sweep("users/local/alice/", older_than_s=0.0, replaced=True)
    assert len(removed) == 4, "three versions and the mark of the deletion"
    page = client.list_object_versions(Bucket="versioned", Prefix="store/")
    assert {line["Key"] for line in page["Versions"]} == {"store/users/local/bob/HEAD"}
    assert len(page["Versions"]) == 3
    assert "DeleteMarkers" not in page
    assert len(objects.sweep("users/local/bob/", older_than_s=0.0, replaced=True)) == 2
    found = objects.get("users/local/bob/HEAD")
    assert found is not None
    assert found[0] == b"three", "the newest is the object itself"


def test_redis_writes_its_file_anew(shared_redis: RedisServer, redis_url: str) -> None:
    objects = open_objects(redis_url)
    objects.put("users/local/alice/v1", b"distinctive bytes of a memory")
    objects.delete("users/local/alice/v1")

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in shared_redis.folder.iterdir() if path.is_file())

    assert b"distinctive bytes of a memory" in files(), "a deletion alone leaves it in the append-only file"
    assert objects.sweep("users/local/alice/", older_than_s=0.0) == []
    for _ in range(2):  # the second while the first may run
        assert objects.sweep("users/local/alice/", older_than_s=0.0, replaced=True) == []
    client = redis.Redis(port=shared_redis.port)
    while client.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(0.01)
    client.close()
    assert b"distinctive bytes of a memory" not in files()
