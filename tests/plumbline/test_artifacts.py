"""Tests of plumbline.artifacts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from plumbline import artifacts
from plumbline.artifacts import (
    MANIFEST,
    DigestCache,
    digest_of,
    file_fault,
    new_folder,
    partial_folder,
    read_manifest,
    write_manifest,
)
from plumbline.refs import FileDigest, file_digest

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""sha256 of "abc", from FIPS 180-2."""


# Folders.


def test_a_folder_appears_as_its_writer_ends(tmp_path):
    target = tmp_path / "runs" / "model"

    with new_folder(target) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "weights").write_text("abc")
        assert not target.exists()
        assert aside.parent == target.parent

    assert (target / "deep" / "weights").read_text() == "abc"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    def broken():
        with new_folder(tmp_path / "model") as aside:
            (aside / "weights").write_text("abc")
            raise error

    with pytest.raises(error):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_a_partial_folder_and_the_next_one_starts_afresh(tmp_path):
    target = tmp_path / "model"
    script = (
        "import sys, time, pathlib\n"
        "from plumbline.artifacts import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as aside:\n"
        "    (aside / 'half').write_text('a')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, target], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == [partial_folder(target)]

    with new_folder(target) as aside:
        (aside / "whole").write_text("abc")

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")

    def overwrite():
        with new_folder(tmp_path / "model") as aside:
            (aside / "weights").write_text("new")

    with pytest.raises(OSError, match="model"):
        overwrite()
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_and_names_are_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        artifacts, "sync", lambda path: synced.append((path, (tmp_path / "model").exists()))
    )

    with new_folder(tmp_path / "model") as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "weights").write_text("abc")

    assert set(synced) == {
        (aside / "deep" / "weights", False),
        (aside / "deep", False),
        (aside, False),
        (tmp_path, True),
    }


# Manifests.


def test_a_manifest_has_the_sha256_and_the_size_of_every_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_text("abc")
    (tmp_path / "empty").write_text("")

    files = write_manifest(tmp_path)

    assert list(files) == ["deep/weights", "empty"]
    assert files["deep/weights"] == FileDigest(sha256=ABC, size=3)
    assert read_manifest(tmp_path) == files
    assert json.loads((tmp_path / MANIFEST).read_text())["deep/weights"] == {
        "sha256": ABC,
        "size": 3,
    }


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[]", b'{"a": 1}', b'{"a": {}}'])
def test_a_manifest_that_can_t_be_read_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)

    assert read_manifest(tmp_path) == {}


# Faults.


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is gone: expected a file, got none"),
        (b"ab", "was cut short: expected 3 bytes, got 2 bytes"),
        (b"", "was cut short: expected 3 bytes, got 0 bytes"),
        (b"abcd", "has grown: expected 3 bytes, got 4 bytes"),
        (b"abd", f"does not match its digest: expected sha256 {ABC}, got "),
    ],
    ids=["deleted", "truncated", "emptied", "grown", "altered"],
)
def test_a_fault_names_the_file_and_both_values(tmp_path, content, what):
    path = tmp_path / "weights"
    path.write_text("abc")
    expected = digest_of(path)
    assert file_fault(path, expected, file_digest) is None

    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)

    assert str(file_fault(path, expected, file_digest)).startswith(f"{path} {what}")


def test_a_file_of_which_only_the_digest_is_known_is_hashed(tmp_path):
    path = tmp_path / "weights"
    path.write_text("abc")

    assert file_fault(path, ABC, file_digest) is None
    path.write_text("ab")
    assert "does not match its digest" in str(file_fault(path, ABC, file_digest))


def test_a_file_of_which_nothing_is_known_must_be_there(tmp_path):
    path = tmp_path / "weights"

    assert "is gone" in str(file_fault(path, None, file_digest))
    path.write_text("abc")
    assert file_fault(path, None, file_digest) is None


def test_a_file_that_can_t_be_read_is_a_fault(tmp_path):
    def failing(path):
        raise OSError(5, "Input/output error")

    (tmp_path / "weights").write_text("abc")

    fault = file_fault(tmp_path / "weights", ABC, failing)

    assert str(fault).endswith("can't be read: expected a file, got Input/output error")


# Digests of files that nobody has touched.


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were hashed; files count as settled at once."""
    names: list[str] = []

    def counting(path):
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(artifacts, "file_digest", counting)
    monkeypatch.setattr(artifacts, "SECONDS_UNTIL_SETTLED", -60.0)
    return names


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights"
    path.write_text("abc")
    return path


def digest_again(path) -> str:
    """A digest as another process gets it, which leaves what it has learnt."""
    cache = DigestCache(path.with_name("digests.json"))
    digest = cache(path)
    cache.save()
    return digest


def test_an_untouched_file_is_hashed_once(weights, hashed):
    assert [digest_again(weights) for _ in range(3)] == [ABC, ABC, ABC]
    assert hashed == ["weights"]


@pytest.mark.parametrize("change", ["rewritten", "rewritten, old time", "replaced", "grown"])
def test_a_touched_file_is_hashed_again(weights, hashed, change):
    digest_again(weights)
    before = weights.stat()
    if change == "replaced":
        other = weights.with_name("other")
        other.write_text("abd")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(weights)
    else:
        # In place, one byte, and the file's time set back: what bit rot and bad tools look like.
        weights.write_text("abcd" if change == "grown" else "abd")
        if change == "rewritten, old time":
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert digest_again(weights) == file_digest(weights) != ABC


def test_a_file_that_changed_just_now_is_not_remembered(weights, monkeypatch):
    digest_again(weights)
    assert not weights.with_name("digests.json").exists()

    monkeypatch.setattr(artifacts, "SECONDS_UNTIL_SETTLED", 0.05)
    time.sleep(0.1)
    digest_again(weights)
    assert weights.with_name("digests.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1]", b'{"x": 3}', b'{"x": [1, 2, 3, 4, 5]}', b'{"x": "12345"}'],
)
def test_garbage_costs_a_hash_and_is_gone_afterwards(weights, hashed, content):
    stored = weights.with_name("digests.json")
    stored.write_bytes(content.replace(b"x", str(weights).encode()))

    assert digest_again(weights) == ABC
    assert digest_again(weights) == ABC
    assert hashed == ["weights"]


def test_two_writers_keep_each_other_s_digests(tmp_path, weights, hashed):
    other = tmp_path / "other"
    other.write_text("other")
    caches = [DigestCache(tmp_path / "digests.json") for _ in range(2)]
    for cache, path in zip(caches, (weights, other), strict=True):
        cache(path)
    for cache in caches:
        cache.save()
    hashed.clear()

    digest_again(weights)
    digest_again(other)

    assert hashed == []


def test_digests_of_files_that_are_gone_are_forgotten(tmp_path, weights, hashed):
    digest_again(weights)
    weights.unlink()
    (tmp_path / "other").write_text("other")
    digest_again(tmp_path / "other")

    assert list(json.loads((tmp_path / "digests.json").read_text())) == [str(tmp_path / "other")]


def test_a_disk_that_takes_nothing_costs_the_memory_only(tmp_path, weights, hashed):
    cache = DigestCache(tmp_path / "nowhere" / "digests.json")

    assert cache(weights) == ABC
    cache.save()
    assert not (tmp_path / "nowhere").exists()
