"""`smartfrz.lock`: a version stays the file that it was, and the highest version does not go down."""

import json
import multiprocessing
import shutil

import pytest
from click.testing import CliRunner
from zoo_fixtures import ServerProcess

from smartfrz import zoo
from smartfrz.cli import main
from smartfrz.errors import ChecksumError, PredictorFileError, RegistryError, UnknownPredictorError
from smartfrz.zoo import embedded_folder, lock, publish, registry, settings

BASE = embedded_folder() / "smartfrz-base.onnx"
TINY = embedded_folder() / "smartfrz-tiny.onnx"
SHA256 = {path: registry.sha256(path.read_bytes()) for path in (BASE, TINY)}
BROKEN = {
    "no JSON": b"{",
    "a list": b"[]",
    "another version": b'{"format_version": 2, "predictors": []}',
    "no list": b'{"format_version": 1, "predictors": 7}',
    "no text": b'{"format_version": 1, "predictors": [{"name": 1, "version": "1", "sha256": "a", "registry": "b"}]}',
    "a path": json.dumps(
        {"format_version": 1, "predictors": [{"name": "../x", "version": "1", "sha256": "a" * 64, "registry": "b"}]}
    ).encode(),
    "control characters": json.dumps(
        {"format_version": 1, "predictors": [{"name": "x", "version": "1", "sha256": "a" * 64, "registry": "\x1b"}]}
    ).encode(),
    "a key twice": b'{"format_version": 1, "predictors": [{"name": "x"}], "predictors": []}',
    "nested too deep": b"[" * 100_000,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    for name in ("SMARTFRZ_ZOO", "SMARTFRZ_OFFLINE", "SMARTFRZ_LOCK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_LOCK", str(tmp_path / "project" / lock.FILE))
    return tmp_path / "project" / lock.FILE


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "served"


@pytest.fixture
def address(folder, tmp_path):
    """The address of a registry on a server, with whatever is in the folder."""
    server = ServerProcess(tmp_path / "log", "zoo_server.py", folder)
    yield f"{server.url}/plain/registry.json"
    server.stop()


def serve(folder, **versions):
    """Write a registry anew, with these versions of `mine`."""
    shutil.rmtree(folder, ignore_errors=True)
    for version, path in versions.items():
        publish.add(path, folder, publish.describe(path, name="mine", version=version.removeprefix("v")), "# card\n")


def load(name, address):
    return zoo.load(name, device="cpu", registries=[address]).info.name


def locked(place):
    rows = json.loads(place.read_text())["predictors"]
    return [(f"{row['name']}@{row['version']}", row["sha256"]) for row in rows]


def smartfrz(*arguments):
    return CliRunner().invoke(main, ["zoo", *map(str, arguments)])


def test_what_is_used_from_another_machine_is_written_down(address, folder, cache):
    serve(folder, v1=BASE)
    registry.entries([address])
    assert not (cache / lock.FILE).exists()
    for _ in range(2):
        load("mine", f"{address}?token=secret")
    assert locked(cache / lock.FILE) == [("mine@1", SHA256[BASE])]
    assert f'"registry": "{address}"' in (cache / lock.FILE).read_text()


def test_a_version_does_not_become_another_file(address, folder, cache):
    serve(folder, v1=BASE)
    load("mine", address)
    serve(folder, v1=TINY)
    for name in ("mine", "mine@1", "mine@1.0"):
        with pytest.raises(ChecksumError, match=r"mine@1 was another file .*type: smartfrz zoo unlock mine@1$"):
            load(name, address)
    assert locked(cache / lock.FILE) == [("mine@1", SHA256[BASE])]
    assert smartfrz("unlock", "mine@1").output.startswith("mine@1 may stand for another file now")
    assert load("mine", address) == "smartfrz-tiny"
    assert locked(cache / lock.FILE) == [("mine@1", SHA256[TINY])]
    assert "nothing is not in" in smartfrz("unlock", "nothing").stderr


def test_the_highest_version_goes_up_and_not_down(address, folder, cache):
    serve(folder, v1=BASE)
    load("mine", address)
    serve(folder, v1=BASE, v2=TINY)
    assert load("mine", address) == "smartfrz-tiny"
    serve(folder, v1=BASE)
    with pytest.raises(RegistryError, match=r"has mine@1 as its highest version, and mine@2 was used before"):
        load("mine", address)
    assert load("mine@1", address) == "smartfrz-base"
    assert locked(cache / lock.FILE) == [("mine@1", SHA256[BASE]), ("mine@2", SHA256[TINY])]


def test_two_registries_may_use_a_name_for_different_things(address, folder, tmp_path):
    serve(folder, v2=BASE)
    load("mine", address)
    serve(tmp_path / "other", v1=TINY)
    server = ServerProcess(tmp_path / "other log", "zoo_server.py", tmp_path / "other")
    try:
        assert load("mine", f"{server.url}/plain/registry.json") == "smartfrz-tiny"
    finally:
        server.stop()


def test_what_is_on_this_machine_is_not_written_down(folder, cache):
    serve(folder, v1=BASE)
    load("mine", str(folder))
    serve(folder, v1=TINY)
    assert load("mine", str(folder)) == "smartfrz-tiny"
    zoo.load(device="cpu")
    assert not cache.exists()


def test_what_is_refused_is_not_written_down(address, folder, cache):
    serve(folder, v1=BASE)
    place = folder / registry.FILE
    place.write_text(place.read_text().replace('"window": 30', '"window": 20'))
    with pytest.raises(PredictorFileError, match="its registry says 20"):
        load("mine", address)
    assert not (cache / lock.FILE).exists()


def test_a_project_is_held_to_version_and_file_wherever_they_come_from(folder, project, tmp_path):
    serve(folder, v1=BASE)
    load("mine", str(folder))
    zoo.load(device="cpu")
    base = registry.find(zoo.DEFAULT)
    assert locked(project) == [("mine@1", SHA256[BASE]), (str(base), base.sha256)]
    serve(folder, v1=BASE, v2=TINY)
    assert load("mine", str(folder)) == "smartfrz-base"
    assert str(registry.find("mine@2", [str(folder)])) == "mine@2"
    serve(folder, v2=TINY)
    with pytest.raises(
        UnknownPredictorError, match=r"has no version 1, to which the lock file holds it\. Known .*: 2\."
    ):
        load("mine", str(folder))
    serve(tmp_path / "other", v1=TINY)
    with pytest.raises(ChecksumError, match=rf"zoo unlock mine@1 --lock {project}$"):
        load("mine", str(tmp_path / "other"))
    serve(tmp_path / "same", v1=BASE)
    assert load("mine", str(tmp_path / "same")) == "smartfrz-base"


def test_a_projects_lock_file_by_option(folder, tmp_path, cache):
    serve(folder, v1=BASE)
    place = tmp_path / "my.lock"
    assert smartfrz("download", "mine", "--registry", folder, "--lock", place, "-o", tmp_path / "x.onnx").exit_code == 0
    assert locked(place) == [("mine@1", SHA256[BASE])]
    assert settings.lock_file() == ""
    serve(folder, v1=TINY)
    result = smartfrz("show", "mine", "--registry", folder, "--lock", place)
    assert result.exit_code == 1
    assert "was another file when it was first used" in " ".join(result.stderr.split())
    assert smartfrz("unlock", "mine", "--lock", place).exit_code == 0
    assert smartfrz("show", "mine", "--registry", folder, "--lock", place).exit_code == 0
    assert not cache.exists()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lock_file_holds_nothing_and_says_so(case, folder, project):
    serve(folder, v1=BASE)
    project.parent.mkdir()
    project.write_bytes(BROKEN[case])
    with pytest.raises(RegistryError, match=r"(?s)The lock file .* is damaged \(.*delete it to lock anew"):
        load("mine", str(folder))
    assert project.read_bytes() == BROKEN[case]


def test_a_projects_lock_file_that_cannot_be_written(folder, tmp_path, monkeypatch):
    serve(folder, v1=BASE)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SMARTFRZ_LOCK", str(tmp_path / "file" / lock.FILE))
    with pytest.raises(RegistryError, match=r"cannot be written .*Give a file in a folder that can be written to"):
        load("mine", str(folder))


def test_a_link_in_the_place_of_the_caches_lock_file_is_not_followed(address, folder, cache, tmp_path):
    serve(folder, v1=BASE)
    cache.mkdir()
    (tmp_path / "precious").write_text("years of work")
    (cache / lock.FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(RegistryError, match="symbolic link, which is not followed inside of the cache"):
        load("mine", address)
    assert (tmp_path / "precious").read_text() == "years of work"


def test_the_cache_itself_may_be_a_link(address, folder, cache, tmp_path, caplog):
    serve(folder, v1=BASE)
    (tmp_path / "disk").mkdir()
    cache.symlink_to(tmp_path / "disk")
    load("mine", address)
    assert caplog.messages == []
    assert sorted(path.name for path in cache.iterdir() if path.name[0] != ".") == [
        "predictors",
        "registries",
        lock.FILE,
    ]
    serve(folder, v1=TINY)
    with pytest.raises(ChecksumError, match="was another file"):
        load("mine", address)


def test_a_cache_that_cannot_be_used_holds_nothing(address, folder, tmp_path, monkeypatch, caplog):
    serve(folder, v1=BASE)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "file" / "cache"))
    assert load("mine", address) == "smartfrz-base"
    assert "cannot be used" in caplog.messages[0]


def remember_one(arguments):
    place, number = arguments
    with settings.choosing("SMARTFRZ_LOCK", place):
        lock.remember(lock.Locked(f"p{number}", "1", "a" * 64, "https://example.org/registry.json"))


def test_processes_that_lock_at_once_lose_nothing(tmp_path):
    place = tmp_path / lock.FILE
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(remember_one, [(str(place), number) for number in range(9)])
    assert [name for name, _ in locked(place)] == [f"p{number}@1" for number in range(9)]


@pytest.mark.parametrize(
    "spelling", ["https://Example.ORG/a/registry.json", "https://example.org:443/a/registry.json?token=x"]
)
def test_a_registry_is_known_by_any_spelling_of_its_address(spelling):
    lock.remember(lock.Locked("mine", "1", "a" * 64, "https://example.org/a/registry.json"))
    with pytest.raises(ChecksumError, match="was another file"):
        lock.check(lock.Locked("mine", "1", "b" * 64, spelling), chosen=True)
    for other in ("https://example.org:8443/a/registry.json", "https://example.org/A/registry.json"):
        lock.check(lock.Locked("mine", "1", "b" * 64, other), chosen=True)
