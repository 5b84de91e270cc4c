import contextlib
import json
import re
import shutil
import sys
from unittest import mock

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo_fixtures import ServerProcess

from smartfrz import zoo
from smartfrz.cli import main
from smartfrz.errors import (
    DownloadError,
    MissingDependencyError,
    RegistryError,
    UnknownPredictorError,
    UnreachableError,
)
from smartfrz.zoo import embedded_folder, publish, registry, transport, urls

BASE = embedded_folder() / "smartfrz-base.onnx"
HTTPS = "https://example.org/zoo/registry.json"


def row(**changes):
    everything = json.loads(registry.serialise(registry.embedded()))["predictors"]
    entry = next(one for one in everything if one["name"] == zoo.DEFAULT)
    entry |= {"name": "other", "version": "1"} | changes
    return {key: value for key, value in entry.items() if value is not None}


def content(*rows):
    return json.dumps({"format_version": 1, "predictors": rows}).encode()


# What is changed in the one entry, and what the error says
WRONG_ENTRIES = {
    "path traversal": ({"file": "../../x.onnx"}, r"file is '\.\./\.\./x\.onnx'; expected a plain file name"),
    "absolute path": ({"file": "/tmp/x.onnx"}, "file is '/tmp/x.onnx'; expected a plain"),
    "path of Windows": ({"file": "..\\x.onnx"}, "expected a plain file name that ends in .onnx, without a folder"),
    "another kind of file": ({"file": "x.pkl"}, "file is 'x.pkl'; expected a plain file name that ends in .onnx"),
    "path in the name": ({"name": "../base"}, r"name is '\.\./base'; expected up to 64 of a-z"),
    "line break in the name": ({"name": "base\n"}, r"name is 'base\\n'"),
    "no text": ({"name": 3}, "name is 3; expected up to 64"),
    "version": ({"version": "latest"}, "version is 'latest'; expected up to three numbers"),
    "hash too short": ({"sha256": "abc"}, "sha256 is 'abc'; expected 64 hexadecimal digits"),
    "hash in capitals": ({"sha256": "A" * 64}, "expected 64 hexadecimal digits"),
    "size as text": ({"size": "12"}, "size is '12'; expected an integer in 1 to 268435456"),
    "no size": ({"size": 0}, "size is 0; expected an integer in 1 to"),
    "3 GB": ({"size": 3 * 10**9}, "size is 3000000000; expected an integer in 1 to 268435456"),
    "truth as a number": ({"window": True}, "window is True; expected an integer"),
    "half a window": ({"window": 2.5}, "window is 2.5; expected an integer"),
    "tailored size": ({"tailored_size": -1}, "tailored_size is -1; expected an integer"),
    "representation": ({"representation": "cooked"}, "representation is 'cooked'; expected one of raw, trajectory"),
    "a list of nothing": ({"representation": [[]]}, r"representation is \[\[\]\]; expected one of raw"),
    "domains": ({"domains": "vision"}, r"domains is 'vision'; expected a list of words"),
    "a domain that is none": ({"domains": ["Vision\x1b[2J"]}, r"domains is \['Vision\\x1b\[2J'\]; expected"),
    "metrics": ({"metrics": [0.9]}, r"metrics is \[0.9\]; expected an object"),
    "license": ({"license": "\x1b]0;x\x07"}, "expected an SPDX identifier"),
    "a field too many": ({"script": "rm"}, "received the keys .*'script'.*; expected an object with domains, file"),
    "a field too few": ({"sha256": None}, "received the keys .*; expected an object with .*sha256"),
    "file of this machine": ({"url": "file:///etc/passwd"}, "which a registry at https:// may not name"),
    "unencrypted": ({"url": "http://localhost/x.onnx"}, "which a registry at https:// may not name"),
    "unencrypted, elsewhere": ({"url": "http://example.org/x.onnx"}, "the url is refused: .*is not encrypted"),
    "traversal in the url": ({"url": "https://example.org/a/../x.onnx"}, r"leaves its own folder \('\.\.'\)"),
    "traversal, hidden": ({"url": "https://example.org/a/%2e%2E%2fx.onnx"}, r"leaves its own folder \('\.\.'\)"),
    "traversal on S3": ({"url": "s3://bucket/../other/x.onnx"}, r"leaves its own folder"),
    "chain of file systems": ({"url": "hf://a/b::file:///etc/passwd"}, "is no plain address"),
    "another scheme": ({"url": "sftp://host/x.onnx"}, "expected one of https://, file://, hf://"),
    "password": ({"url": "https://me:secret@example.org/x.onnx"}, "holds a user name or password"),
}
WRONG_FILES = {
    "no JSON": (b"{", "it is no valid JSON"),
    "no text": (b"\xff\xfe\x00", "it is no valid JSON"),
    "nested too deep": (b"[" * 100_000, "it is no valid JSON"),
    "no object": (b"[]", "it has no format_version; expected an object with format_version and predictors"),
    "no version": (b'{"predictors": []}', "it has no format_version"),
    "another version": (
        b'{"format_version": 2, "predictors": []}',
        "it has format_version 2; this version of smartfrz r",
    ),
    "version as text": (b'{"format_version": "1", "predictors": []}', "it has format_version '1'"),
    "truth as version": (b'{"format_version": true, "predictors": []}', "it has format_version True"),
    "no predictors": (b'{"format_version": 1}', r"it has \['format_version'\]; expected format_version and a list"),
    "predictors by name": (b'{"format_version": 1, "predictors": {}}', "a list named predictors"),
    "a key twice": (b'{"format_version": 1, "predictors": [], "predictors": []}', "one object has a key twice"),
    "no entry": (b'{"format_version": 1, "predictors": [7]}', "in entry 1, received 7; expected an object"),
    "no number": (b'{"format_version": NaN, "predictors": []}', "NaN is no number"),
    "infinite": (b'{"format_version": 1e999, "predictors": []}', "1e999 is no number"),
}
ADDRESSES = {
    "https://example.org/zoo": "https://example.org/zoo/registry.json",
    "https://example.org/zoo/": "https://example.org/zoo/registry.json",
    "https://example.org/mine.json": "https://example.org/mine.json",
    "hf://org/repo": "hf://org/repo/registry.json",
    "s3://bucket/zoo": "s3://bucket/zoo/registry.json",
    "http://localhost:8000/zoo": "http://localhost:8000/zoo/registry.json",
    "http://[::1]:8000/zoo": "http://[::1]:8000/zoo/registry.json",
}
WRONG_ADDRESSES = {
    "https://example.org:port/zoo": "is no address",
    "http://example.org/zoo": "is not encrypted; expected https://.*SMARTFRZ_ALLOW_HTTP=1",
    "http://localhost.example.org/zoo": "is not encrypted",
    "javascript://x": "cannot be read: expected one of",
    "https://example.org/a b": "is no plain address",
    "https://example.org/a\x1b[2J": "is no plain address",
    "file://host/share/registry.json": "names a host; expected three slashes",
}


def write(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "registry.json").write_bytes(content(*rows))
    return str(folder)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    for name in ("SMARTFRZ_ZOO", "SMARTFRZ_OFFLINE", "SMARTFRZ_ALLOW_HTTP", "SMARTFRZ_ALLOW_PRIVATE", "SMARTFRZ_LOCK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("case", WRONG_ENTRIES)
def test_wrong_entries_are_refused(case):
    changes, message = WRONG_ENTRIES[case]
    with pytest.raises(RegistryError, match=rf"(?s)registry {HTTPS} cannot be used: in entry 2, .*{message}"):
        registry.parse(content(row(name="fine"), row(**changes)), HTTPS, exact=case == "a field too many")


def test_fields_of_a_later_version_are_ignored_and_not_lost():
    plain = registry.parse(content(row()), HTTPS)
    grown = json.loads(content(row(languages=["de"], card={"sha256": "x"}))) | {"signed_by": ["somebody"]}
    assert registry.parse(json.dumps(grown).encode(), HTTPS) == plain
    # Who adds an entry writes all of them again, and would take away what we do not know.
    with pytest.raises(RegistryError, match=r"it has \['format_version', 'predictors', 'signed_by'\]"):
        registry.parse(json.dumps(grown).encode(), HTTPS, exact=True)
    with pytest.raises(RegistryError, match="languages"):
        registry.parse(content(row(languages=["de"])), HTTPS, exact=True)


def test_the_users_own_machine_is_named_by_registries_on_it_only():
    url = "https://localhost:8443/x.onnx"
    with pytest.raises(RegistryError, match="on your own machine, which a registry elsewhere may not name"):
        registry.parse(content(row(url=url)), HTTPS)
    for own in ("file:///zoo/registry.json", "https://localhost/zoo/registry.json"):
        assert registry.parse(content(row(url=url)), own)[0].address == url


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_refused(case):
    text, message = WRONG_FILES[case]
    with pytest.raises(RegistryError, match=rf"cannot be used: .*{message}.*Tell its owner, or leave it out"):
        registry.parse(text, HTTPS)


@given(st.binary(max_size=100))
def test_garbage_is_refused(text):
    with pytest.raises(RegistryError):
        registry.parse(text, HTTPS)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(row())), _VALUES)
def test_any_value_of_any_field_is_read_or_refused(key, value):
    with contextlib.suppress(RegistryError):
        (entry,) = registry.parse(content(row() | {key: value}), HTTPS)
        assert entry.file.endswith(".onnx")
        assert "/" not in entry.file
        assert 0 < entry.size <= 256 * 2**20
        assert entry.address.startswith(("https://", "hf://", "s3://", "gs://"))


def check_hostile(folder, text):
    (folder / "registry.json").write_bytes(text)
    for arguments in (["list"], ["list", "--json"], ["show", "other"], ["path", "other"], ["verify", str(folder)]):
        if arguments[0] != "verify":
            arguments = [*arguments, "--registry", str(folder)]
        with mock.patch.object(transport, "_open_http", side_effect=DownloadError("no network in this test")):
            result = CliRunner().invoke(main, ["zoo", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        shown = result.output.replace("\n", "").replace("\t", "")
        assert "\x1b" not in shown
        assert "root:" not in shown


HOSTILE = [
    int("9" * 4000),
    -(10**4000),
    1e308,
    "\x1b[2J\x1b]0;x\x07",
    "\ud800",
    "a" * 100_000,
    "../../x.onnx",
    "file:///etc/passwd",
    "https://169.254.169.254/x.onnx",
    "https://[::1/x.onnx",
    "https://example.org:99999/x.onnx",
    "https://xn--a/\u2028.onnx",
    {"auc": int("9" * 4000)},
    {"auc": True, "\x1b[2J": "\x1b[2J"},
    {"auc": "\x1b[2J"},
    [[[[[]]]]],
]


@pytest.mark.parametrize("key", [*row(), "later"])
def test_no_hostile_value_ends_in_a_traceback_or_reaches_the_terminal(key, tmp_path):
    for value in HOSTILE:
        check_hostile(tmp_path, content(row(**{key: value})))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([*row(), "later"]), _VALUES, max_size=3),
    st.dictionaries(st.sampled_from(["format_version", "predictors", "later"]), _VALUES, max_size=1),
    st.binary(max_size=3),
    st.integers(0, 600),
)
def test_no_mutated_registry_ends_in_a_traceback_or_reaches_the_terminal(tmp_path, changes, document, noise, place):
    """Values of any kind in any field, and bytes of any kind at any place."""
    whole = {"format_version": 1, "predictors": [row(**changes)]} | document
    text = bytearray(json.dumps(whole).encode())
    text[place : place + len(noise)] = noise
    check_hostile(tmp_path, text)


def test_two_entries_of_one_name_and_version_are_refused():
    registry.parse(content(row(version="1"), row(version="2")), HTTPS)
    for other in ("1", "1.0"):
        with pytest.raises(RegistryError, match=f"two entries 'other@{other}'; expected one of a name and version"):
            registry.parse(content(row(version="1"), row(version=other)), HTTPS)


def test_what_is_written_is_read_again():
    entries = registry.parse(content(row(version="10"), row(version="9"), row(name="a")), HTTPS)
    again = registry.parse(registry.serialise(entries), HTTPS)
    assert [str(entry) for entry in again] == ["a@1", "other@9", "other@10"]
    assert sorted(map(repr, again)) == sorted(map(repr, entries))


def test_where_files_lie():
    (beside,) = registry.parse(content(row()), "https://example.org/zoo/registry.json?token=1")
    assert beside.address == "https://example.org/zoo/smartfrz-base.onnx"
    (apart,) = registry.parse(content(row(url="s3://bucket/x.onnx")), HTTPS)
    assert apart.address == "s3://bucket/x.onnx"
    embedded = registry.embedded()
    assert zoo.DEFAULT in {entry.name for entry in embedded}
    assert [entry.address for entry in embedded] == [""] * len(embedded)


@pytest.mark.parametrize("location", ADDRESSES)
def test_addresses_of_registries(location):
    assert urls.registry_url(location) == ADDRESSES[location]


@pytest.mark.parametrize("location", WRONG_ADDRESSES)
def test_wrong_addresses_of_registries(location):
    with pytest.raises(DownloadError, match=WRONG_ADDRESSES[location]):
        urls.registry_url(location)


def test_passwords_are_not_repeated():
    with pytest.raises(DownloadError) as caught:
        urls.check("https://me:secret@example.org/registry.json")
    assert "secret" not in str(caught.value)


def test_http_elsewhere_when_it_is_allowed(monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ALLOW_HTTP", "1")
    assert urls.check("http://example.org/x.onnx") == "http://example.org/x.onnx"


def test_a_registry_on_this_machine_is_used_in_place(tmp_path, monkeypatch):
    folder = write(tmp_path / "zoo folder", row())
    shutil.copy(BASE, tmp_path / "zoo folder")
    assert zoo.load("other", device="cpu", registries=[folder]).path.parent == tmp_path / "zoo folder"
    monkeypatch.setenv("SMARTFRZ_ZOO", f"  {(tmp_path / 'zoo folder').as_uri()}\n")
    assert zoo.load("other@1.0", device="cpu").info.name == "smartfrz-base"
    assert not (tmp_path / "cache").exists()


def test_the_first_registry_that_knows_a_name_answers(tmp_path):
    first = write(tmp_path / "first", row(version="2"), row(version="10"), row(name="smartfrz-base", version="7"))
    second = write(tmp_path / "second", row(version="11"), row(name="more"))
    found = {name: registry.find(name, [first, second]) for name in ("other", "other@11", "other@2", "more")}
    assert {name: entry.version for name, entry in found.items()} == {
        "other": "10", "other@11": "11", "other@2": "2", "more": "1"
    }  # fmt: skip
    # A registry cannot put itself in front of what comes with the package, unless that version is asked for.
    assert registry.find("smartfrz-base", [first, second]).registry == registry.EMBEDDED
    assert registry.find("smartfrz-base@7", [first, second]).registry.endswith("/first/registry.json")
    embedded, listed = map(str, registry.embedded()), map(str, registry.entries([first]))
    assert list(listed) == [*embedded, "other@2", "other@10", "smartfrz-base@7"]


def test_names_of_this_package_need_no_other_registry(monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ZOO", "https://nowhere.invalid/registry.json")
    assert registry.find("smartfrz-base").registry == registry.EMBEDDED


def test_unknown_names_and_versions(tmp_path):
    folder = write(tmp_path / "zoo", row(name="smartfrz-huge"), row(name="smartfrz-huge", version="2"))
    known = ", ".join(sorted({entry.name for entry in registry.embedded()} | {"smartfrz-huge"}))
    with pytest.raises(
        UnknownPredictorError, match=rf"Did you mean 'smartfrz-huge'\? Known predictors: {re.escape(known)}\."
    ):
        registry.find("smartfrz-hugi", [folder])
    with pytest.raises(UnknownPredictorError, match=r"'smartfrz-huge' has no version 3. Known versions: 1, 2\."):
        registry.find("smartfrz-huge@3", [folder])
    with pytest.raises(UnknownPredictorError, match="asks for version 'new'; expected up to three numbers"):
        registry.find("smartfrz-huge@new", [folder])


def test_a_missing_registry_on_this_machine(tmp_path):
    with pytest.raises(DownloadError, match=r"gone/registry\.json does not exist. Check the address"):
        registry.entries([str(tmp_path / "gone")])


def test_a_registry_that_is_too_long(tmp_path):
    (tmp_path / "registry.json").write_bytes(b" " * (registry.MAX_SIZE + 1))
    with pytest.raises(DownloadError, match=f"expected at most {registry.MAX_SIZE}"):
        registry.entries([str(tmp_path)])


def test_a_registry_that_cannot_be_reached_is_read_from_its_copy(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transport, "PAUSE", 0.01)
    write(tmp_path / "served", row())
    shutil.copy(BASE, tmp_path / "served")
    server = ServerProcess(tmp_path / "log", "zoo_server.py", tmp_path / "served")
    address = f"{server.url}/plain/registry.json"
    try:
        assert zoo.load("other", device="cpu", registries=[address]).info.window == 30
    finally:
        server.stop()
    assert caplog.messages == []
    assert zoo.load("other", device="cpu", registries=[address]).info.window == 30
    assert "cannot be reached; its copy in the cache is used" in caplog.messages[0]
    assert "Tried 2 times" in caplog.messages[0]
    caplog.clear()
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    assert zoo.load("other", device="cpu", registries=[address]).info.window == 30
    assert caplog.messages == []
    with pytest.raises(UnreachableError, match="SMARTFRZ_OFFLINE is set"):
        registry.entries([f"{server.url}/plain/other.json"])


BROKEN_ANSWERS = {
    "a captive portal's page": b"<!DOCTYPE html><html><body>Please sign in.</body></html>",
    "half of it": content(row())[:-100],
    "nothing": b"",
    "another format": b'{"format_version": 2, "predictors": []}',
}


@pytest.mark.parametrize("case", BROKEN_ANSWERS)
def test_a_broken_answer_does_not_replace_a_good_copy(case, tmp_path, caplog):
    write(tmp_path / "served", row())
    shutil.copy(BASE, tmp_path / "served")
    server = ServerProcess(tmp_path / "log", "zoo_server.py", tmp_path / "served")
    address = f"{server.url}/plain/registry.json"
    try:
        registry.find("other", [address])
        (tmp_path / "served" / "registry.json").write_bytes(BROKEN_ANSWERS[case])
        for _ in range(2):
            assert str(registry.find("other", [address])) == "other@1"
        assert "answers with what cannot be used; its copy in the cache is. The registry http" in caplog.messages[1]
        (copy,) = (tmp_path / "cache" / "registries").iterdir()
        assert copy.read_bytes() == content(row())
        copy.unlink()
        with pytest.raises(RegistryError, match="cannot be used"):
            registry.find("other", [address])
        assert list((tmp_path / "cache" / "registries").iterdir()) == []
        # A copy that is damaged, or a link to somewhere else, is none.
        (tmp_path / "elsewhere.json").write_bytes(content(row()))
        copy.symlink_to(tmp_path / "elsewhere.json")
        with pytest.raises(RegistryError, match="cannot be used"):
            registry.find("other", [address])
        write(tmp_path / "served", row(version="2"))
        assert str(registry.find("other", [address])) == "other@2"
        assert (tmp_path / "elsewhere.json").read_bytes() == content(row())
        assert not copy.is_symlink()
    finally:
        server.stop()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "smartfrz\[zoo,cpu\]" s3fs$'):
        registry.entries(["s3://bucket"])
    with pytest.raises(MissingDependencyError, match=r'pip install "smartfrz\[hub,cpu\]"'):
        registry.entries(["hf://org/repo"])


def test_file_systems_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r"s3:// addresses need .*Type: pip install s3fs"):
        registry.entries(["s3://bucket"])


def test_metrics_of_other_forms_are_left_out():
    assert publish.held_out({}) == {}
    assert publish.held_out({"leave_one_architecture_out": {"cnn": {"predictor": 0.9}}}) == {}
    assert publish.held_out({"leave_one_architecture_out": [0.9]}) == {}


@pytest.mark.parametrize("metrics", [{"note": "\x1b[2J"}, {"\ud800": 1}, {"rows": [{"a": "b\x07"}]}], ids=ascii)
def test_metrics_with_characters_that_a_terminal_obeys_are_refused(metrics):
    document = json.loads((embedded_folder() / "registry.json").read_bytes())
    document["predictors"][0]["metrics"] = metrics
    with pytest.raises(
        RegistryError, match=r"in entry 1, metrics has the text .*expected no control characters"
    ) as error:
        registry.parse(json.dumps(document).encode(), "https://example.org/registry.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("depth", [60, 600, 900])
def test_metrics_that_are_nested_without_need_are_refused(depth):
    content = registry.serialise(registry.embedded()).replace(
        b'"metrics": {', b'"metrics": {"a":' + b"[" * depth + b"]" * depth + b",", 1
    )
    with pytest.raises(RegistryError, match="in entry 1, lists and objects are nested more than 50 deep"):
        registry.parse(content, "https://example.org/registry.json")
