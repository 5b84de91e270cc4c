"""`smartfrz zoo` in-process: exit code 0 done, 1 failed, 2 wrong usage."""

import json
import shutil
import sys

import pytest
from click.testing import CliRunner
from terminal import run_on_a_terminal
from zoo_fixtures import ServerProcess, write_registry

from smartfrz.cli import main
from smartfrz.zoo import embedded_folder, fetch, registry

BASE = embedded_folder() / "smartfrz-base.onnx"
SHA256 = registry.sha256(BASE.read_bytes())

# Arguments; {text} is a text file, {base} a predictor, {empty} a folder
WRONG_USAGE = {
    "no such command": (["lst"], "No such command 'lst'"),
    "no name": (["download"], "Missing argument 'NAME'"),
    "no file to verify": (
        ["verify", "{empty}/gone.onnx"],
        "gone.onnx' does not exist; expected a predictor (.onnx), a registry (.json), or a folder with registry.json",
    ),
    "a name to verify": (
        ["verify", "smartfrz-base"],
        "smartfrz-base is a name: smartfrz zoo path smartfrz-base prints where",
    ),
    "a folder without registry": (["verify", "{empty}"], "has no registry.json; expected a folder with one"),
    "no file to add": (["add", "{empty}/gone.onnx", "{empty}"], "does not exist"),
    "no target": (["publish", "{base}"], "Missing argument 'TARGET'"),
    "an address that is not kept": (["download", "https://example.org/x.onnx"], "Add it, or pass --output"),
}
FAILURES = {
    "unknown name": (["show", "smartfrz-bse"], "Did you mean 'smartfrz-base'?"),
    "unknown version": (["path", "smartfrz-base@99"], "has no version 99. Known versions: "),
    "missing registry": (["list", "--registry", "{empty}"], "registry.json does not exist"),
    "unencrypted registry": (["list", "--registry", "http://example.org/zoo"], "is not encrypted"),
    "no predictor": (["add", "{text}", "{empty}"], "is not a SmartFRZ predictor, or is cut"),
    "wrong version": (["add", "{base}", "{empty}", "--version", "new"], "expected up to three numbers"),
    "no card": (["publish", "{bare}", "{empty}"], "has no card"),
    "web server": (["publish", "{base}", "https://example.org/zoo"], "cannot be written to"),
    "unknown file system": (["publish", "{base}", "nowhere://zoo"], "cannot be read (Protocol not known: nowhere)"),
}


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    for name in ("SMARTFRZ_ZOO", "SMARTFRZ_OFFLINE", "SMARTFRZ_ALLOW_PRIVATE", "SMARTFRZ_LOCK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no predictor\n")
    shutil.copy(BASE, tmp_path / "bare.onnx")
    names = {"empty": "empty", "text": "text.onnx", "bare": "bare.onnx"}
    return {key: str(tmp_path / name) for key, name in names.items()} | {"base": str(BASE)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(BASE, folder / "tiny-zoo-1.onnx")
    (folder / "tiny-zoo-1.md").write_text("# tiny-zoo\n\n\x1b[2Jcleared\n")
    process = ServerProcess(tmp_path_factory.mktemp("log") / "log", "zoo_server.py", folder)
    yield process
    process.stop()


def smartfrz(*arguments):
    return CliRunner().invoke(main, ["zoo", *map(str, arguments)])


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage(case, places):
    arguments, message = WRONG_USAGE[case]
    result = smartfrz(*(argument.format(**places) for argument in arguments))
    assert message in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case, places, tmp_path):
    arguments, message = FAILURES[case]
    result = smartfrz(*(argument.format(**places) for argument in arguments))
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.exit_code == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_list():
    result = smartfrz("list")
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert header.split()[:2] == ["predictor", "window"]
    assert "auc" in registry.find("smartfrz-base").metrics
    for row, entry in zip(rows, registry.embedded(), strict=True):
        facts = [str(entry), str(entry.window), str(entry.tailored_size), entry.representation, ",".join(entry.domains)]
        auc = f"{entry.metrics['auc']:.3f}" if "auc" in entry.metrics else "-"
        assert row.split()[:7] == [*facts, auc, f"{entry.size / 1e6:.1f}"]
        assert row.endswith("in this package")
    listed = {entry["name"]: entry for entry in json.loads(smartfrz("list", "--json").stdout)}
    assert listed["smartfrz-base"]["sha256"] == SHA256


def test_show():
    result = smartfrz("show", "smartfrz-base")
    assert result.exit_code == 0
    assert f"sha256         {SHA256}" in result.stdout
    assert BASE.with_suffix(".md").read_text("utf-8") in result.stdout


def test_show_of_what_lies_elsewhere_leaves_the_terminal_alone(server, tmp_path):
    path = write_registry(tmp_path, BASE, server)
    result = smartfrz("show", "tiny-zoo", "--registry", path)
    assert "# tiny-zoo\n\n[2Jcleared\n" in result.stdout
    without = write_registry(tmp_path, BASE, server, url=f"{server.url}/status-404/x.onnx")
    result = smartfrz("show", "tiny-zoo", "--registry", without)
    assert result.exit_code == 0
    assert "Its card cannot be shown" in result.stderr


def test_download_path_and_verify(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ZOO", str(write_registry(tmp_path, BASE, server)))
    path = fetch.path_of(SHA256)
    assert smartfrz("path").stdout == f"{tmp_path / 'cache'}\n"
    assert smartfrz("path", "tiny-zoo").stdout == f"{path}\n"
    assert not path.exists()
    result = smartfrz("download", "tiny-zoo")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}\n", "")
    assert path.read_bytes() == BASE.read_bytes()
    assert "in the cache" in smartfrz("list").stdout

    result = smartfrz("verify")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok"] * (len(registry.embedded()) + 1)
    path.write_bytes(path.read_bytes()[:-10])
    result = smartfrz("verify")
    assert result.exit_code == 1
    assert f"bad  {path}  SHA-256 " in result.stdout
    assert "1 damaged. A file in the cache is fetched again" in result.stderr
    assert smartfrz("download", "tiny-zoo").exit_code == 0
    assert smartfrz("verify").exit_code == 0


def test_download_into_a_cache_that_cannot_be_written(server, places, tmp_path, monkeypatch):
    path = write_registry(tmp_path, BASE, server)
    monkeypatch.setenv("SMARTFRZ_CACHE", f"{places['text']}/cache")
    result = smartfrz("download", "tiny-zoo", "--registry", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "cannot be kept in the cache" in result.stderr
    assert "Pass --output, or set SMARTFRZ_CACHE" in result.stderr
    assert smartfrz("download", "tiny-zoo", "--registry", path, "-o", tmp_path / "my.onnx").exit_code == 0
    assert (tmp_path / "my.onnx").read_bytes() == BASE.read_bytes()


def test_addresses_inside_of_a_private_network_need_an_option(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_ALLOW_HTTP", "1")
    path = write_registry(tmp_path, BASE, server)
    path.write_text(path.read_text().replace("//127.0.0.1:", "//127.1:"))  # another way to write it
    arguments = ("download", "tiny-zoo", "--registry", path)
    result = smartfrz(*arguments)
    assert result.exit_code == 1
    assert "at 127.0.0.1, inside of a private network" in " ".join(result.stderr.split())
    assert smartfrz(*arguments, "--allow-private").exit_code == 0
    fetch.path_of(SHA256).unlink()
    assert smartfrz(*arguments).exit_code == 1  # it counted for one command
    monkeypatch.setenv("SMARTFRZ_ALLOW_PRIVATE", "1")
    assert smartfrz(*arguments).exit_code == 0


def test_download_to_a_place_of_ones_own(tmp_path):
    (tmp_path / "out").mkdir()
    assert smartfrz("download", "smartfrz-base", "-o", tmp_path / "out").exit_code == 0
    assert smartfrz("download", "smartfrz-base", "-o", tmp_path / "new" / "my.onnx").exit_code == 0
    for path in ("out/smartfrz-base.onnx", "new/my.onnx"):
        assert (tmp_path / path).read_bytes() == BASE.read_bytes()
    assert smartfrz("download", "smartfrz-base").stdout == f"{BASE}\n"


def test_verify_without_onnxruntime_calls_nothing_damaged(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = smartfrz("verify")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == len(registry.embedded())
    assert all(line.startswith("ok   smartfrz-") and line.endswith("  not loaded") for line in lines)
    assert (
        "Checksums match, but loading was not tried. SmartFRZ asks its predictor through onnxruntime" in result.stderr
    )
    assert 'pip install "smartfrz[cpu]"' in result.stderr
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(BASE.read_bytes()[:-10])
    result = smartfrz("verify", cut)
    assert result.exit_code == 1
    assert "or was altered" in result.stdout


def test_verify_a_file_and_a_registry(places, server, tmp_path):
    assert smartfrz("verify", BASE).stdout == f"ok   {BASE}  {SHA256}\n"
    result = smartfrz("verify", places["text"])
    assert result.exit_code == 1
    assert "is not a SmartFRZ predictor, or is cut" in result.stdout
    assert smartfrz("add", BASE, tmp_path / "zoo", "--name", "mine").exit_code == 0
    for path in (tmp_path / "zoo", tmp_path / "zoo" / "registry.json"):
        assert smartfrz("verify", path).stdout == f"ok   mine@1  {SHA256}\n"
    elsewhere = write_registry(tmp_path, BASE, server)
    assert smartfrz("verify", elsewhere).stdout == (
        f"-    tiny-zoo@1  is at {server.url}/plain/tiny-zoo-1.onnx; it is checked when it is fetched\n"
    )
    (tmp_path / "zoo" / "mine-1.onnx").unlink()
    result = smartfrz("verify", tmp_path / "zoo")
    assert result.exit_code == 1
    assert "bad  mine@1  SHA-256 None" in result.stdout


def test_add_and_publish(places, tmp_path):
    result = smartfrz("add", BASE, tmp_path / "zoo", "--name", "mine", "--domain", "vision", "--domain", "language")
    assert (result.exit_code, result.stdout) == (0, f"added mine@1 to {tmp_path / 'zoo' / 'registry.json'}\n")
    (tmp_path / "card.md").write_text("# bare\n")
    result = smartfrz(
        "publish", places["bare"], tmp_path / "zoo", "--card", tmp_path / "card.md", "--name", "bare", "--version", "3"
    )
    address = (tmp_path / "zoo" / "registry.json").as_uri()
    assert result.stdout == f"published bare@3: smartfrz zoo download bare@3 --registry {address}\n"
    listed = json.loads(smartfrz("list", "--registry", tmp_path / "zoo", "--json").stdout)
    assert [(e["name"], e["version"], e["domains"]) for e in listed[len(registry.embedded()) :]] == [
        ("bare", "3", []),
        ("mine", "1", ["vision", "language"]),
    ]
    assert (tmp_path / "zoo" / "bare-3.md").read_text() == "# bare\n"


def test_adding_what_lies_there_already_keeps_its_name(places, tmp_path):
    for entry in registry.embedded():
        for name in (entry.file, entry.card):
            shutil.copy(embedded_folder() / name, tmp_path / "empty")
        path = tmp_path / "empty" / entry.file
        domains = [argument for domain in entry.domains for argument in ("--domain", domain)]
        assert smartfrz("add", path, tmp_path / "empty", "--version", entry.version, *domains).exit_code == 0
    # As the registry of this package is made.
    made = (tmp_path / "empty" / "registry.json").read_bytes()
    assert made == (embedded_folder() / "registry.json").read_bytes()


def test_a_bar_is_drawn_on_a_terminal_only(server, tmp_path):
    pytest.importorskip("rich")
    path = write_registry(tmp_path, BASE, server, "slow")
    code = "from smartfrz.cli import main; main()"
    command = [sys.executable, "-c", code, "zoo", "download", "tiny-zoo", "--registry", str(path)]
    drawn, output, returned = run_on_a_terminal(command)
    assert returned == 0
    assert output == f"{fetch.path_of(SHA256)}\n"
    assert b"tiny-zoo" in drawn
    assert f"/{BASE.stat().st_size / 1e6:.1f} MB".encode() in drawn
