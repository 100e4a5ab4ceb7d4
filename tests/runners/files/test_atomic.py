"""Files that are whole or not there."""

import resource
from contextlib import contextmanager

import pytest

from paretorch.runners.files.atomic import remove_parts, write_atomic, write_whole


@contextmanager
def full_disk():
    """No file can grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [write_atomic, write_whole])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, tmp_path):
    path = tmp_path / "file"
    write(path, "old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(path, b"x" * 1001)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write(path, b"new")
    assert path.read_bytes() == b"new"


def test_only_a_file_that_can_be_made_again_makes_its_folder(tmp_path):
    """A study whose folder was deleted must fail rather than begin another one there."""
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "deep" / "file", "text")
    write_whole(tmp_path / "deep" / "file", "text")
    assert (tmp_path / "deep" / "file").read_text() == "text"


def test_what_a_kill_has_left_is_removed(tmp_path):
    left = [tmp_path / ".front.csv.12.partial", tmp_path / "deep" / ".front.csv.12.part"]
    kept = [tmp_path / "front.csv", tmp_path / "deep" / "of.partial", tmp_path / ".hidden"]
    (tmp_path / "deep").mkdir()
    for path in (*left, *kept):
        path.write_text("text")
    remove_parts(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
