from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.arena import (
    SEGMENT_PREFIX,
    TRAILER_BYTES,
    Arena,
    _available_memory,
    _free_pages,
    _is_in_memory,
)

SHARED = "/dev/shm"


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def own_segments() -> list[str]:
    """This process's in shared memory, where stores of other processes come and go."""
    return [name for name in segments(Path(SHARED)) if name.lstrip(".").startswith(f"{SEGMENT_PREFIX}{os.getpid()}-")]


def test_views_are_shared_memory_and_the_segment_goes_with_close(tmp_path: Path) -> None:
    arena = Arena(3 * 4096 + 5, str(tmp_path))
    assert arena.extents.capacity == 3 * 4096
    assert segments(tmp_path) == [arena.path.name]
    arena.view(4096, 3)[:] = (1, 2, 3)
    with arena.path.open("rb") as other:
        other.seek(4096)
        assert other.read(3) == bytes((1, 2, 3))
    arena.close()
    arena.close()
    assert segments(tmp_path) == []


def test_a_killed_owners_segment_is_removed_and_a_living_ones_kept(tmp_path: Path) -> None:
    living = Arena(4096, str(tmp_path))
    code = (
        "import sys, os, time; from services.adapter_store.arena import Arena\n"
        f"a = Arena(4096, {str(tmp_path)!r}); print(a.path.name, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    orphan = child.stdout.readline().strip()
    assert segments(tmp_path) == sorted([living.path.name, orphan])
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert orphan in segments(tmp_path), "nobody has removed it yet"

    fresh = Arena(4096, str(tmp_path))
    assert segments(tmp_path) == sorted([living.path.name, fresh.path.name])
    living.close()
    fresh.close()


def test_what_a_store_left_before_it_had_a_name_is_removed_once_it_is_old(tmp_path: Path) -> None:
    fresh, old, locked = (tmp_path / f".{SEGMENT_PREFIX}1-{number}" for number in range(3))
    for path in (fresh, old, locked):
        path.touch()
    for path in (old, locked):
        os.utime(path, (time.time() - 120, time.time() - 120))
    with locked.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Arena(4096, str(tmp_path)).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, locked.name]


@pytest.mark.parametrize("how", ["a link", "another name", "a pipe", "a folder", "another user's"])
def test_what_only_has_a_stale_arenas_name_keeps_its_content(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, precious = tmp_path / "shm", tmp_path / "precious"
    directory.mkdir()
    precious.write_bytes(b"x" * 8192)
    planted = directory / f"{SEGMENT_PREFIX}1-0"
    if how == "a link":
        planted.symlink_to(precious)
    elif how == "another name":
        planted.hardlink_to(precious)
    elif how == "a pipe":
        os.mkfifo(planted)
    elif how == "a folder":
        planted.mkdir()
    else:
        precious = planted
        planted.write_bytes(b"x" * 8192)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    Arena(4096, str(directory)).close()
    assert planted.is_symlink() or planted.exists()
    assert precious.read_bytes() == b"x" * 8192


def test_an_arena_that_cannot_be_had_says_which_setting_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arena_bytes is 100"):
        Arena(100, str(tmp_path))
    with pytest.raises(ValueError, match="arena_dir"):
        Arena(4096, str(tmp_path / "nowhere"))


def test_more_than_the_memory_file_system_holds_is_refused_at_the_start() -> None:
    room = os.statvfs(SHARED)
    before = own_segments()
    with pytest.raises(ValueError, match="has no room"):
        Arena((room.f_blocks + 1) * room.f_frsize, SHARED)
    assert own_segments() == before


def test_more_than_the_memory_that_is_left_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs may claim to be larger than that; filling it would kill processes."""
    monkeypatch.setattr("services.adapter_store.arena._available_memory", lambda: 8 * 2**20)
    before = own_segments()
    with pytest.raises(ValueError, match=f"has no room for {16 * 2**20 + TRAILER_BYTES} bytes: {8 * 2**20} are left;"):
        Arena(16 * 2**20, SHARED)
    assert own_segments() == before
    Arena(4 * 2**20, SHARED).close()


def test_what_lies_in_memory_is_known() -> None:
    assert _is_in_memory(Path(SHARED))
    assert not _is_in_memory(Path("/proc"))
    assert 2**20 < _available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_reader_knows_the_segment_by_its_trailer_and_may_read_it_as_the_mode_says(tmp_path: Path) -> None:
    for group_readable, mode in ((False, 0o600), (True, 0o640)):
        arena = Arena(2 * 4096, str(tmp_path), group_readable)
        found = arena.path.stat()
        assert (found.st_mode & 0o777, found.st_size) == (mode, 2 * 4096 + TRAILER_BYTES)
        assert arena.path.read_bytes()[2 * 4096 :][:16] == arena.arena_id
        assert len(arena.view(0, 3 * 4096)) == 2 * 4096, "the trailer is nobody's extent"
        arena.close()
    assert Arena(4096, str(tmp_path)).arena_id != arena.arena_id


@pytest.mark.parametrize("how", ["closed", "stale"])
def test_what_readers_map_of_an_arena_that_is_gone_is_zeros_and_no_memory(how: str) -> None:
    arena = Arena(2**20, SHARED)
    arena.view(0, 2**20)[:] = 7
    with arena.path.open("rb") as file, mmap.mmap(file.fileno(), 2**20, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == b"\7" * 2**20
        if how == "closed":
            arena.close()
        else:
            fcntl.flock(arena._fd, fcntl.LOCK_UN)  # as if its store had been killed
            Arena(4096, SHARED).close()
            assert not arena.path.exists()
        assert os.fstat(file.fileno()).st_blocks == 0
        assert mapped[:] == bytes(2**20)
    arena.close()


def test_a_new_store_waits_for_the_memory_that_readers_of_the_old_one_have_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room_yet(directory: Path, num_bytes: int) -> None:
        asked.append(num_bytes)
        if len(asked) < 3:
            raise OSError(errno.ENOSPC, "full")

    asked: list[int] = []
    monkeypatch.setattr("services.adapter_store.arena._check_room", no_room_yet)
    with pytest.raises(ValueError, match="has no room"):
        Arena(4096, str(tmp_path))
    assert len(asked) == 1, "nobody is gone: nothing will come back"
    stale = tmp_path / f"{SEGMENT_PREFIX}1-0"
    stale.touch()
    Arena(4096, str(tmp_path)).close()
    assert len(asked) == 3
    assert not stale.exists()


@pytest.mark.parametrize("num_pages", [1, 2, 257])
def test_the_words_go_before_the_bytes_that_were_lent(num_pages: int) -> None:
    """Whoever has copied zeros must not find an id."""
    arena = Arena(num_pages * 4096, SHARED)
    arena.view(0, num_pages * 4096)[:] = 7
    seen = []

    class Segment:
        def __len__(self) -> int:
            return len(arena._map)

        def madvise(self, *what: int) -> None:
            arena._map.madvise(*what)
            seen.append((any(arena._map[-TRAILER_BYTES:]), any(arena._map[:-TRAILER_BYTES])))

    assert arena.residency_words.take().residency_id
    segment: Any = Segment()
    _free_pages(segment)
    assert seen == [(False, True), (False, False)]
    arena.close()
