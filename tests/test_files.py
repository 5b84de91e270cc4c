"""`replacing`: what users expect of a file that is written again, and of a process that was killed meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from smartfrz.files import open_regular, replacing

HOLDS = """
import sys, time
from smartfrz.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    time.sleep(60)
"""

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, links and locks of POSIX")


def write(path, content=b"new"):
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@pytest.fixture
def holder(tmp_path):
    """A process that is writing `tmp_path/run.json`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run.json")], stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        yield process
        process.kill()


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o444])
def test_permissions_of_a_file_that_exists_are_kept(tmp_path, mode):
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == mode


@posix
def test_the_umask_of_the_process_is_not_touched(tmp_path, monkeypatch):
    def touched(mask):
        raise AssertionError("another thread would create files with other permissions meanwhile")

    monkeypatch.setattr(os, "umask", touched)
    write(tmp_path / "run.json")


@posix
@pytest.mark.parametrize("kind", ["absolute", "relative", "chain"])
def test_a_link_is_followed(tmp_path, kind):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    real, link = tmp_path / "real" / "run.json", tmp_path / "links" / "run.json"
    real.write_bytes(b"old")
    if kind == "chain":
        (tmp_path / "other.json").symlink_to(real)
        link.symlink_to("../other.json")
    else:
        link.symlink_to(real if kind == "absolute" else "../real/run.json")
    write(link)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.rglob("*.json")) == sorted(
        ["run.json", "run.json", *(["other.json"] if kind == "chain" else [])]
    )


@posix
def test_a_link_that_leads_nowhere_yet_is_followed(tmp_path):
    (tmp_path / "run.json").symlink_to("later.json")
    write(tmp_path / "run.json")
    assert (tmp_path / "run.json").is_symlink()
    assert (tmp_path / "later.json").read_bytes() == b"new"


@posix
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(OSError, match=r"run\.json' is no regular file; expected a path .*Choose another"):
        write(tmp_path / "run.json")
    with pytest.raises(OSError, match="is no regular file"):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@posix
def test_what_a_killed_process_left_is_removed(tmp_path, holder):
    others = {".run-notes.json", ".run-0123456789abcdef.txt", ".runner-0123456789abcdef.json", ".run-0123456789abcdef"}
    for name in others:
        (tmp_path / name).touch()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    write(tmp_path / "run.json")
    assert {p.name for p in tmp_path.iterdir()} == others | {"run.json"}


@posix
def test_what_another_process_is_writing_is_left_alone(tmp_path, holder):
    (unfinished,) = tmp_path.iterdir()
    write(tmp_path / "run.json")
    assert unfinished.read_bytes() == b"half"
    assert holder.poll() is None


def test_threads_that_write_the_same_file_do_not_hinder_each_other(tmp_path):
    path, failed = tmp_path / "run.json", []

    def write_often(letter):
        try:
            for _ in range(50):
                write(path, letter * 1000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write_often, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in {letter * 1000 for letter in (b"a", b"b", b"c")}
        time.sleep(0.001)
    assert not failed
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@posix
def test_the_new_name_is_on_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def watched(handle):
        synced.append(os.path.realpath(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else str(tmp_path))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write(tmp_path / "run.json")
    assert synced[-1] == str(tmp_path.resolve())


def test_a_long_name_fits(tmp_path):
    name = "ü" * 100 + ".json"
    write(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_no_handle_is_left_open(tmp_path):
    folder = "/proc/self/fd"
    if not os.path.exists(folder):
        pytest.skip("needs /proc")
    before = len(os.listdir(folder))
    for _ in range(5):
        write(tmp_path / "run.json")
    assert len(os.listdir(folder)) == before


def test_a_link_that_leads_to_itself_is_left_as_it_is(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="a' is a symbolic link that leads to itself; expected a file"):
        write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_symlink()) == ["a", "b"]


def test_a_path_that_ends_in_a_slash_is_no_file(tmp_path):
    with pytest.raises(OSError, match="/out/' ends as the path of a folder; expected the path of a file"):
        write(f"{tmp_path}/out/")
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(OSError, match=f"Is no regular file.*{name}"):
            open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        open_regular(tmp_path)


@posix
def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
