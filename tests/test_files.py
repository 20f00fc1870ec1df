"""Locks: one holder at a time, and a disk without locks stops nobody."""

from __future__ import annotations

import errno
import fcntl

import pytest

from megalens import files
from megalens.files import Lock


def test_a_lock_has_one_holder_and_is_free_again(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.release()
    assert second.acquire(wait=False)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told_once_and_stops_nobody(tmp_path, monkeypatch, capsys, code):
    def flock(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_without_locks", set())
    for name in ("a", "b"):
        with Lock(tmp_path / name) as lock:
            assert lock.fileno() >= 0
    said = capsys.readouterr().err
    assert said == f"warning: the disk of {tmp_path} has no locks; see to it that no other process writes there\n"


def test_any_other_failure_of_a_lock_is_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"):
        Lock(tmp_path / "a").acquire(wait=True)
