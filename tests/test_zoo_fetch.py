"""Downloads from a real server on a socket, which cuts, lies, redirects and floods."""

import io
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from zoo_fixtures import ServerProcess, write_registry

from smartfrz import zoo
from smartfrz.errors import ChecksumError, DownloadError, PredictorFileError, UnreachableError
from smartfrz.zoo import embedded_folder, fetch, registry, transport

BASE = embedded_folder() / "smartfrz-base.onnx"
CONTENT = BASE.read_bytes()
SHA256 = registry.sha256(CONTENT)

# Mode of the server, limit, size (None: not known) and what the error says
REFUSED = {
    "too long for the registry": ("plain", 10**7, 1000, rf"has {len(CONTENT)} bytes; expected 1000, as its registry"),
    "too long for anybody": ("plain", 1000, None, rf"has {len(CONTENT)} bytes; expected at most 1000"),
    "too short": ("plain", 10**7, 10**7, rf"has {len(CONTENT)} bytes; expected 10000000, as its"),
    "sends more than it says": ("short", 10**7, len(CONTENT), rf"has {len(CONTENT) // 2} bytes; expected"),
    "sends less than it says": ("long", 10**8, len(CONTENT), rf"has {len(CONTENT) * 2} bytes; expected"),
    "flood without a length": ("bomb", 10**7, None, "goes on after 10000000 bytes, which is all it may have"),
    "flood of a known file": ("bomb", 10**7, len(CONTENT), rf"goes on after {len(CONTENT)} bytes"),
    "zip bomb": ("gzip", 10**7, len(CONTENT), "comes with Content-Encoding 'gzip'; expected the plain file"),
}
# Where a server on this machine sends one to
REDIRECTS = {
    "file": ("file:///etc/passwd", "redirects to 'file:///etc/passwd', another scheme; that is not followed"),
    "ftp": ("ftp://localhost/x.onnx", "redirects to 'ftp://localhost/x.onnx', another scheme"),
    "https": ("https://localhost/x.onnx", "another scheme"),
    "s3": ("s3://bucket/x.onnx", "another scheme"),
    "elsewhere, unencrypted": ("http://example.org/x.onnx", "is not encrypted; expected https://"),
    "with a password": ("http://me:secret@localhost/x.onnx", "An address at 'localhost' holds a user name or password"),
}

WORKER = """
import sys
from smartfrz import zoo
print("ready", flush=True)
sys.stdin.readline()
print(zoo.load("tiny-zoo", device="cpu", registries=[sys.argv[1]]).sha256)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(BASE, folder / "tiny-zoo-1.onnx")
    other = bytearray(CONTENT)
    other[len(other) // 2] ^= 1
    (folder / "damaged.onnx").write_bytes(other)
    (folder / "text.onnx").write_text("no predictor\n")
    process = ServerProcess(tmp_path_factory.mktemp("log") / "log", "zoo_server.py", folder)
    process.folder = folder
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and no pauses between attempts."""
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SMARTFRZ_ZOO", raising=False)
    for name in ("SMARTFRZ_OFFLINE", "SMARTFRZ_ALLOW_PRIVATE", "SMARTFRZ_LOCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def registry_of(server, tmp_path):
    """Write a registry whose file is served in a mode."""

    def write(mode, **changes):
        return str(write_registry(tmp_path, BASE, server, mode, **changes))

    return write


def fetched(url, **options):
    buffer = io.BytesIO()
    transport.download(url, buffer, **{"limit": 10**7, **options})
    return buffer.getvalue()


def start(registry_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, registry_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(condition, seconds=60):
    for _ in range(seconds * 100):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def parts(folder):
    return sorted(path.name for path in (folder / "predictors").glob("*") if path.suffix != ".lock")


def test_a_predictor_of_a_registry_is_fetched_once_and_answers(server, registry_of, folder):
    path = registry_of("plain")
    before = len(server.requests("plain"))
    first = zoo.load("tiny-zoo", device="cpu", registries=[path])
    again = zoo.load("tiny-zoo@1", device="cpu", registries=[path])
    assert len(server.requests("plain")) == before + 1
    assert parts(folder) == [f"{SHA256}.onnx"]
    history, lengths = np.random.default_rng(0).normal(size=(2, 30, 1024)).astype(np.float32), np.array([30, 7])
    answers = [p.predict(history, lengths).confidence for p in (first, again, zoo.load(device="cpu"))]
    np.testing.assert_array_equal(answers[0], answers[2])
    np.testing.assert_array_equal(answers[1], answers[2])


def test_progress_is_told(server):
    seen = []
    fetched(f"{server.url}/plain/tiny-zoo-1.onnx", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("case", REFUSED)
def test_files_of_another_length_are_refused(case, server):
    mode, limit, size, message = REFUSED[case]
    buffer = io.BytesIO()
    with pytest.raises(DownloadError, match=message) as caught:
        transport.download(f"{server.url}/{mode}/tiny-zoo-1.onnx", buffer, limit=limit, size=size)
    assert not isinstance(caught.value, UnreachableError)
    assert buffer.getvalue() == b""


@pytest.mark.parametrize("case", REDIRECTS)
def test_redirects_are_not_followed(case, server):
    target, message = REDIRECTS[case]
    with pytest.raises(DownloadError, match=message):
        fetched(f"{server.url}/redirect?to={target}")


def test_redirects_on_the_same_server_are_followed(server):
    assert fetched(f"{server.url}/redirect?to=/plain/tiny-zoo-1.onnx") == CONTENT


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_encrypted_downloads(server, tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "served").mkdir()
    shutil.copy(BASE, tmp_path / "served" / "x.onnx")
    encrypted = ServerProcess(tmp_path / "log", "zoo_server.py", tmp_path / "served", certificate, key)
    url = encrypted.url.replace("http://127.0.0.1", "https://localhost")
    try:
        with pytest.raises(DownloadError, match=r"has no certificate that is trusted here \(self.signed") as caught:
            fetched(f"{url}/plain/x.onnx")
        assert not isinstance(caught.value, UnreachableError)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(f"{url}/once-1000/x.onnx") == CONTENT
        assert fetched(f"{url}/redirect?to={url}/plain/x.onnx") == CONTENT
        with pytest.raises(DownloadError, match=r"redirects to 'http://127.*, another scheme; that is not followed"):
            fetched(f"{url}/redirect?to={server.url}/plain/tiny-zoo-1.onnx")
    finally:
        encrypted.stop()


def test_a_redirect_in_circles_ends(server):
    with pytest.raises(DownloadError, match="cannot be fetched: 302"):
        fetched(f"{server.url}/circle")


def test_a_cut_is_gone_on_with(server):
    cut = len(CONTENT) // 4
    assert fetched(f"{server.url}/once-{cut}/tiny-zoo-1.onnx", size=len(CONTENT)) == CONTENT
    assert server.requests(f"once-{cut}") == ["-", f"bytes={cut}-"]


def test_several_cuts_without_a_known_size(server):
    cut = len(CONTENT) // 3 + 1
    assert fetched(f"{server.url}/cut-{cut}/tiny-zoo-1.onnx") == CONTENT
    assert server.requests(f"cut-{cut}") == ["-", f"bytes={cut}-", f"bytes={2 * cut}-"]


def test_a_server_without_ranges_begins_anew(server):
    buffer = io.BytesIO(b"something else that came before")
    transport.download(f"{server.url}/no-range/tiny-zoo-1.onnx", buffer, limit=10**7, size=len(CONTENT))
    assert buffer.getvalue() == CONTENT
    assert server.requests("no-range") == ["bytes=31-"]


def test_a_beginning_that_is_longer_than_the_file(server):
    url = f"{server.url}/plain/text.onnx"
    for size in (13, None):
        buffer = io.BytesIO(bytes(100))
        transport.download(url, buffer, limit=1000, size=size)
        assert buffer.getvalue() == b"no predictor\n"


def test_the_wrong_part_of_a_file_is_refused(server):
    with pytest.raises(DownloadError, match=r"was asked for the bytes from 3 on and answers '0-\d+/\d+'"):
        transport.download(f"{server.url}/wrong-range/tiny-zoo-1.onnx", io.BytesIO(b"abc"), limit=10**7)


def test_a_server_that_always_cuts_is_given_up_and_what_came_is_kept(server, registry_of, folder):
    cut = len(CONTENT) // 8
    path, arrived = registry_of(f"cut-{cut}"), 5 * cut
    with pytest.raises(UnreachableError, match=rf"broke off after {arrived} of {len(CONTENT)} bytes\. Tried 5 times"):
        zoo.load("tiny-zoo", registries=[path])
    assert (folder / "predictors" / f"{SHA256}.part").read_bytes() == CONTENT[:arrived]
    assert zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")]).info.name == "smartfrz-base"
    assert server.requests("plain")[-1] == f"bytes={arrived}-"
    assert parts(folder) == [f"{SHA256}.onnx"]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server):
    assert fetched(f"{server.url}/busy/tiny-zoo-1.onnx") == CONTENT
    assert len(server.requests("busy")) == 2
    with pytest.raises(DownloadError, match=r"cannot be fetched: 404 Not Found\. Check the address"):
        fetched(f"{server.url}/plain/nothing.onnx")
    assert server.requests("plain").count("-") >= 1
    with pytest.raises(UnreachableError, match="cannot be fetched now: 503"):
        fetched(f"{server.url}/status-503")
    with pytest.raises(DownloadError, match="cannot be fetched: 403"):
        fetched(f"{server.url}/status-403")


def test_no_server_at_all():
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9/x\.onnx cannot be reached .*Tried 5 times"):
        fetched("http://127.0.0.1:9/x.onnx")


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    import socket

    monkeypatch.setattr(transport, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnreachableError, match="timed out"):
        fetched(f"http://127.0.0.1:{silent.getsockname()[1]}/x.onnx")


def test_a_server_that_sends_byte_by_byte_is_given_up_at_the_deadline(server):
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"/drip/tiny-zoo-1\.onnx did not arrive in time\. Tried once"):
        fetched(f"{server.url}/drip/tiny-zoo-1.onnx", deadline=0.5)
    assert time.monotonic() - start < 10


def test_a_server_that_refuses_every_range_is_asked_without_one(server):
    with pytest.raises(DownloadError, match="cannot be fetched: 416"):
        transport.download(f"{server.url}/status-416", io.BytesIO(b"abc"), limit=1000)


def test_a_file_with_another_hash_is_not_kept(registry_of, folder):
    path = registry_of("plain", sha256="a" * 64)
    with pytest.raises(
        ChecksumError, match=rf"has SHA-256 {SHA256[:12]}\.\.\.; expected aaaaaaaaaaaa\.\.\. for tiny-zoo@1"
    ):
        zoo.load("tiny-zoo", registries=[path])
    assert parts(folder) == []


def test_a_beginning_of_another_file_is_noticed(server, registry_of, folder):
    (folder / "predictors").mkdir(parents=True)
    (folder / "predictors" / f"{SHA256}.part").write_bytes(bytes(1000))
    zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    assert server.requests("plain")[-2:] == ["bytes=1000-", "-"]
    assert parts(folder) == [f"{SHA256}.onnx"]


# Mode of the server, or an address on it, and what the error says
REFUSED_BY_NAME = {
    "zip bomb": ("gzip", "comes with Content-Encoding 'gzip'; expected the plain file"),
    "flood": ("bomb", f"goes on after {len(CONTENT)} bytes, which is all it may have"),
    "sends more than it says": (
        "short",
        f"has {len(CONTENT) // 2} bytes; expected {len(CONTENT)}, as its registry says",
    ),
    "sends less than it says": ("long", f"has {len(CONTENT) * 2} bytes; expected {len(CONTENT)}"),
    "redirect to a file": ("/redirect?to=file:///etc/passwd", "another scheme; that is not followed"),
}


@pytest.mark.parametrize("case", REFUSED_BY_NAME)
def test_nothing_of_a_refused_file_is_kept(case, server, registry_of, folder):
    mode, message = REFUSED_BY_NAME[case]
    path = registry_of("plain", url=f"{server.url}{mode}") if mode.startswith("/") else registry_of(mode)
    with pytest.raises(DownloadError, match=message):
        zoo.load("tiny-zoo", registries=[path])
    assert parts(folder) == []


def test_an_archive_under_the_name_of_a_predictor_is_not_unpacked(server, registry_of, folder):
    archive = server.folder / "archive.onnx"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../evil.txt", bytes(2**24))
    content = archive.read_bytes()
    path = registry_of(
        "plain", url=f"{server.url}/plain/archive.onnx", size=len(content), sha256=registry.sha256(content)
    )
    with pytest.raises(PredictorFileError, match="is not a SmartFRZ predictor, or is cut"):
        zoo.load("tiny-zoo", registries=[path])
    assert parts(folder) == []
    assert not list(folder.parent.parent.rglob("evil.txt"))


def test_what_is_no_predictor_is_not_kept(server, registry_of, folder):
    text = b"no predictor\n"
    path = registry_of("plain", url=f"{server.url}/plain/text.onnx", size=len(text), sha256=registry.sha256(text))
    with pytest.raises(PredictorFileError, match="is not a SmartFRZ predictor, or is cut"):
        zoo.load("tiny-zoo", registries=[path])
    assert parts(folder) == []


def test_a_predictor_other_than_its_registry_says_is_not_kept(registry_of, folder):
    with pytest.raises(PredictorFileError, match=r"has window=30; its registry says 20\. It was not kept"):
        zoo.load("tiny-zoo", registries=[registry_of("plain", window=20)])
    assert parts(folder) == []


def test_a_damaged_file_in_the_cache_is_fetched_again_and_said_so(server, registry_of, folder, caplog, monkeypatch):
    path = registry_of("plain")
    zoo.load("tiny-zoo", registries=[path])
    kept = folder / "predictors" / f"{SHA256}.onnx"
    kept.write_bytes(CONTENT[:-1] + b"x")
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    with pytest.raises(ChecksumError, match=r"in the cache is damaged .*Unset it to fetch the file again"):
        zoo.load("tiny-zoo", registries=[path])
    monkeypatch.delenv("SMARTFRZ_OFFLINE")
    assert caplog.messages == []
    zoo.load("tiny-zoo", registries=[path])
    assert caplog.messages == [f"The file of tiny-zoo@1 in the cache is damaged ({kept}); it is fetched again."]
    assert kept.read_bytes() == CONTENT


def test_two_processes_fetch_it_once(server, registry_of, folder):
    path = registry_of("slow")
    processes = [start(path), start(path)]
    before = len(server.requests("slow"))
    for process in processes:
        go(process)
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [zoo.load(device="cpu").sha256] * 2
    assert len(server.requests("slow")) == before + 1
    assert parts(folder) == [f"{SHA256}.onnx"]


def test_threads_of_one_process_fetch_it_once(server, registry_of, folder):
    path = registry_of("slow")
    before = len(server.requests("slow"))
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: zoo.load("tiny-zoo", device="cpu", registries=path), range(4)))
    assert {predictor.sha256 for predictor in loaded} == {zoo.load(device="cpu").sha256}
    assert len(server.requests("slow")) == before + 1
    assert parts(folder) == [f"{SHA256}.onnx"]


def test_a_killed_download_is_gone_on_with(server, registry_of, folder):
    process = start(registry_of("slow"))
    part = folder / "predictors" / f"{SHA256}.part"
    go(process)
    wait_for(lambda: part.exists() and part.stat().st_size > len(CONTENT) // 8)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    arrived = part.stat().st_size
    assert len(CONTENT) // 8 < arrived < len(CONTENT)
    assert parts(folder) == [part.name]
    zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    assert server.requests("plain")[-1] == f"bytes={arrived}-"
    assert parts(folder) == [f"{SHA256}.onnx"]


def test_a_slow_mirror_does_not_keep_others_from_another_one(server, registry_of, folder):
    """A process that fetches the file from a server which takes hours must not lock it for everybody."""
    process = start(registry_of("drip"))
    go(process)
    try:
        part = folder / "predictors" / f"{SHA256}.part"
        wait_for(lambda: part.exists())
        before = len(server.requests("plain"))
        assert zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")]).info.name == "smartfrz-base"
        assert len(server.requests("plain")) == before + 1
        assert process.poll() is None
        assert parts(folder) == [f"{SHA256}.onnx", part.name]
    finally:
        process.kill()
        process.communicate()


def test_who_waits_for_a_slow_mirror_takes_the_file_that_another_one_brought(registry_of, folder):
    slow = registry_of("drip")
    processes = [start(slow), start(slow)]
    try:
        go(processes[0])
        wait_for(lambda: parts(folder))
        go(processes[1])
        zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
        assert processes[1].communicate(timeout=60)[0].strip() == zoo.load(device="cpu").sha256
        assert processes[0].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_who_waits_for_a_slow_mirror_gives_up_at_the_deadline(registry_of, folder, monkeypatch):
    slow = registry_of("drip")
    process = start(slow)
    try:
        go(process)
        wait_for(lambda: parts(folder))
        monkeypatch.setattr(transport, "DEADLINE", 0.5)
        with pytest.raises(
            UnreachableError, match=r"Another process has been fetching http://.*/drip/tiny-zoo-1\.onnx"
        ):
            zoo.load("tiny-zoo", device="cpu", registries=[slow])
    finally:
        process.kill()
        process.communicate()


def test_mock_what_fails_in_another_way_is_not_left_behind(registry_of, folder, monkeypatch):
    """ONNX Runtime has errors of its own, and a check can run out of memory."""

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(fetch, "Predictor", fail)
    with pytest.raises(MemoryError):
        zoo.load("tiny-zoo", registries=[registry_of("plain")])
    assert parts(folder) == []


def test_facts_are_compared_on_each_load(registry_of):
    zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    other = registry_of("plain", window=20)
    with pytest.raises(PredictorFileError, match=r"has window=30; its registry says 20\. It is not used"):
        zoo.load("tiny-zoo", device="cpu", registries=[other])
    with pytest.raises(PredictorFileError, match="its registry says 20"), zoo.locate("tiny-zoo", [other]):
        pass


@pytest.mark.parametrize("name", [f"{SHA256}.part", f"{SHA256}.onnx", f"{SHA256}.lock"])
def test_a_link_in_the_cache_is_not_followed(name, registry_of, folder, tmp_path):
    """In a shared cache, another user could have us overwrite a file of ours."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"years of work" * 100)
    (folder / "predictors").mkdir(parents=True)
    (folder / "predictors" / name).symlink_to(precious)
    assert zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")]).info.name == "smartfrz-base"
    assert precious.read_bytes() == b"years of work" * 100
    kept = folder / "predictors" / f"{SHA256}.onnx"
    assert not kept.is_symlink()
    assert kept.exists() == (not name.endswith(".lock"))  # without a lock, it is fetched for this time only


def test_links_to_the_right_file_and_folder_are_not_followed_either(registry_of, folder, tmp_path, caplog):
    (folder / "predictors").mkdir(parents=True)
    kept = folder / "predictors" / f"{SHA256}.onnx"
    kept.symlink_to(BASE)
    zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    assert not kept.is_symlink()
    assert "is damaged" in caplog.messages[0]
    shutil.rmtree(folder / "predictors")
    (tmp_path / "elsewhere").mkdir()
    (folder / "predictors").symlink_to(tmp_path / "elsewhere")
    zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    assert "is a symbolic link, which is not followed inside of the cache" in caplog.messages[1]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_hard_links_and_pipes_in_the_cache_are_not_used(registry_of, folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"years of work")
    (folder / "predictors").mkdir(parents=True)
    (folder / "predictors" / f"{SHA256}.part").hardlink_to(precious)
    os.mkfifo(folder / "predictors" / f"{SHA256}.onnx")
    assert zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")]).info.name == "smartfrz-base"
    assert precious.read_bytes() == b"years of work"


def test_a_cache_that_cannot_be_written_is_done_without(registry_of, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "file" / "cache"))
    loaded = zoo.load("tiny-zoo", device="cpu", registries=[registry_of("plain")])
    assert loaded.sha256 == zoo.load(device="cpu").sha256
    (message,) = caplog.messages
    assert "cannot be used" in message
    assert "Not a directory" in message
    assert f"Free {len(CONTENT)} bytes there, or set SMARTFRZ_CACHE" in message


def test_a_full_disk(registry_of, folder):
    """No file may grow beyond a quarter of it, in a process of its own: neither in the cache nor among temporary files."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(CONTENT) // 4}, {len(CONTENT) // 4}))\n"
        "from smartfrz import zoo\n"
        "try: zoo.load('tiny-zoo', registries=[sys.argv[1]])\n"
        "except zoo.DownloadError as error: print(error)"
    )
    command = [sys.executable, "-c", code, registry_of("plain")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "There is no place to write tiny-zoo@1 ([Errno 27] File too large)" in result.stdout
    assert "name a folder with SMARTFRZ_CACHE" in result.stdout
    assert parts(folder) == []


def test_mock_an_error_of_writing_is_none_of_the_network(server):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    before = len(server.requests("plain"))
    with pytest.raises(OSError, match="No space left"):
        transport.download(f"{server.url}/plain/text.onnx", Full(), limit=1000)
    assert len(server.requests("plain")) == before + 1


def test_offline(server, registry_of, monkeypatch):
    path = registry_of("plain")
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    before = len(server.requests("plain"))
    with pytest.raises(DownloadError, match=r"SMARTFRZ_OFFLINE is set, so that http://.*is not fetched"):
        zoo.load("tiny-zoo", registries=[path])
    assert len(server.requests("plain")) == before
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "0")
    zoo.load("tiny-zoo", registries=[path])
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    assert zoo.load("tiny-zoo", registries=[path]).info.window == 30
    assert zoo.load("smartfrz-base").info.window == 30


def test_an_address_with_its_hash_is_verified_and_kept(server, folder):
    url = f"{server.url}/plain/tiny-zoo-1.onnx"
    before = len(server.requests("plain"))
    for _ in range(2):
        assert zoo.load(f"{url}#sha256={SHA256.upper()}", device="cpu").info.name == "smartfrz-base"
    assert len(server.requests("plain")) == before + 1
    assert parts(folder) == [f"{SHA256}.onnx"]
    with pytest.raises(ChecksumError, match="expected bbbbbbbbbbbb"):
        zoo.load(f"{url}#sha256={'b' * 64}")
    with pytest.raises(DownloadError, match=r"ends in #md5=1; expected #sha256= and 64 hexadecimal digits"):
        zoo.load(f"{url}#md5=1")


def test_an_address_without_hash_is_used_with_a_warning_and_not_kept(server, folder):
    with pytest.warns(UserWarning, match=r"is used unverified, and fetched each time\. Add #sha256=") as caught:
        loaded = zoo.load(f"{server.url}/plain/tiny-zoo-1.onnx", device="cpu")
    assert caught[0].filename == __file__
    assert loaded.sha256 == zoo.load(device="cpu").sha256
    assert not folder.exists()
    with (
        pytest.warns(UserWarning, match="unverified"),
        pytest.raises(PredictorFileError, match="is damaged or was altered"),
    ):
        zoo.load(f"{server.url}/plain/damaged.onnx")


def test_addresses_of_files_on_this_machine(tmp_path):
    copy = shutil.copy(BASE, tmp_path / "with blank.onnx")
    assert zoo.load(copy.as_uri(), device="cpu").info.window == 30
    assert zoo.load(f"{copy.as_uri()}#sha256={SHA256}", device="cpu").info.window == 30
    with pytest.raises(ChecksumError, match=r"expected bbbbbbbbbbbb.*Copy the file again"):
        zoo.load(f"{copy.as_uri()}#sha256={'b' * 64}")


@pytest.mark.parametrize(
    "url", ["https://localhost:8080/base?x=1", "https://localhost:8080/base#sha256=0", "http://localhost/"]
)
def test_an_address_of_neither_a_file_nor_a_server(url):
    with pytest.raises(
        DownloadError, match=r"is neither the address of a file, which ends in .onnx, nor of a predictor"
    ):
        zoo.load(url)


def test_an_address_that_names_no_predictor_file_is_not_downloaded():
    with pytest.raises(DownloadError, match=r"'http://localhost:8080/smartfrz-base' is no address of a predictor"):
        zoo.file_of("http://localhost:8080/smartfrz-base").__enter__()


def test_the_cache_is_where_it_is_usual_on_this_system(monkeypatch):
    monkeypatch.delenv("SMARTFRZ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert fetch.folder().name == "smartfrz"


def test_trainings_take_addresses_as_well(server):
    torch = pytest.importorskip("torch")
    from smartfrz.adapters.torch import SmartFRZ

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = SmartFRZ(model, optimizer, f"{server.url}/plain/tiny-zoo-1.onnx#sha256={SHA256}", total_steps=100)
    assert freezer.predictor.info.name == "smartfrz-base"


def test_logging_says_nothing_when_all_is_well(registry_of, caplog, capfd):
    with caplog.at_level(logging.DEBUG, "smartfrz"):
        zoo.load("tiny-zoo", registries=[registry_of("plain")])
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
