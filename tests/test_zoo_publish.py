import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
from zoo_fixtures import ServerProcess

from smartfrz import zoo
from smartfrz.errors import PredictorFileError, RegistryError
from smartfrz.zoo import embedded_folder, publish, registry

BASE = embedded_folder() / "smartfrz-base.onnx"
CARD = BASE.with_suffix(".md").read_text("utf-8")
COMMAND = "from smartfrz.cli import main; main(prog_name='smartfrz')"


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    for name in ("SMARTFRZ_ZOO", "SMARTFRZ_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def added(registries):
    """What registries hold besides what comes with the package, which is listed first."""
    embedded, listed = registry.embedded(), registry.entries(registries)
    assert listed[: len(embedded)] == embedded
    return listed[len(embedded) :]


def add_one(arguments):
    folder, name = arguments
    publish.add(BASE, folder, publish.describe(BASE, name=name), CARD)


def test_what_is_said_of_a_file_comes_from_the_file():
    entry = publish.describe(BASE, version="2.1", domains=["vision"])
    assert (entry.name, entry.file, entry.card) == (
        "smartfrz-base",
        "smartfrz-base-2.1.onnx",
        "smartfrz-base-2.1.md",
    )
    assert (entry.window, entry.tailored_size, entry.representation) == (30, 1024, "trajectory+loss")
    assert (entry.size, entry.sha256) == (BASE.stat().st_size, registry.sha256(BASE.read_bytes()))
    assert entry.metrics == registry.find("smartfrz-base").metrics
    assert entry.metrics["auc"] > entry.metrics["weight_change_auc"] > 0.5


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": "My Net"}, r"My Net@1 cannot be added to a registry: name is 'My Net'; expected up to 64 of a-z"),
        ({"version": "new"}, r"version is 'new'; expected up to three numbers"),
        ({"domains": ["a b"]}, r"domains is \('a b',\); expected a list of words"),
    ],
)
def test_what_a_registry_may_not_hold(facts, message):
    with pytest.raises(RegistryError, match=message):
        publish.describe(BASE, **facts)


def test_only_predictors_are_added(tmp_path):
    (tmp_path / "text.onnx").write_text("no predictor\n")
    with pytest.raises(PredictorFileError, match="is not a SmartFRZ predictor"):
        publish.describe(tmp_path / "text.onnx")


def test_added_predictors_are_loaded_by_name(tmp_path):
    folder = tmp_path / "zoo"
    for version in ("1", "2"):
        publish.add(BASE, folder, publish.describe(BASE, name="mine", version=version), CARD)
    assert files(folder) == ["mine-1.md", "mine-1.onnx", "mine-2.md", "mine-2.onnx", "registry.json"]
    assert (folder / "mine-1.md").read_text("utf-8") == CARD
    assert zoo.load("mine", device="cpu", registries=[str(folder)]).path == folder / "mine-2.onnx"
    again = (folder / "registry.json").read_bytes()
    publish.add(BASE, folder, publish.describe(BASE, name="mine", version="2"), CARD)
    assert (folder / "registry.json").read_bytes() == again


def test_a_published_version_stays_what_it_is(tmp_path, predictor_file):
    publish.add(BASE, tmp_path, publish.describe(BASE, name="mine"), CARD)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RegistryError, match=r"mine@1 is in the registry with another file .*Pass a higher --version"):
        publish.add(predictor_file, tmp_path, publish.describe(predictor_file, name="mine", version="1.0"), CARD)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_was_replaced_is_noticed(tmp_path, predictor_file):
    path = shutil.copy(BASE, tmp_path / "mine.onnx")
    publish.add(path, tmp_path, publish.describe(path, name="mine", file="mine.onnx"), CARD)
    shutil.copy(predictor_file, path)
    entry = publish.describe(path, name="mine", version="2", file="mine.onnx")
    with pytest.raises(
        RegistryError, match=r"mine\.onnx is the file of mine@1, with other content\. Give the new file"
    ):
        publish.add(path, tmp_path, entry, CARD)


def test_a_registry_that_is_wrong_is_not_added_to(tmp_path):
    (tmp_path / "registry.json").write_text("{}")
    with pytest.raises(RegistryError, match="it has no format_version"):
        publish.add(BASE, tmp_path, publish.describe(BASE), CARD)
    assert (tmp_path / "registry.json").read_text() == "{}"
    assert files(tmp_path) == ["registry.json"]


def test_processes_that_add_at_once_lose_nothing(tmp_path):
    names = [f"p{number}" for number in range(6)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(add_one, [(tmp_path, name) for name in names])
    assert [e.name for e in added([str(tmp_path)])] == names


def test_a_folder_by_path_and_by_address(tmp_path):
    for number, target in enumerate((str(tmp_path / "a b"), (tmp_path / "a b").as_uri()), 1):
        entry = publish.describe(BASE, version=str(number))
        address = publish.publish(BASE, target, entry, CARD)
        assert address == (tmp_path / "a b" / "registry.json").as_uri()
    assert [str(e) for e in added([address])] == ["smartfrz-base@1", "smartfrz-base@2"]


def test_any_file_system_of_fsspec():
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for version in ("1", "2"):
        address = publish.publish(BASE, "memory://bucket/zoo/", publish.describe(BASE, version=version), CARD)
    assert address == "memory://bucket/zoo/registry.json"
    listed = registry.parse(fs.cat_file("/bucket/zoo/registry.json"), "s3://bucket/zoo/registry.json")
    assert [str(e) for e in listed] == ["smartfrz-base@1", "smartfrz-base@2"]
    assert fs.cat_file("/bucket/zoo/smartfrz-base-2.onnx") == BASE.read_bytes()
    assert fs.cat_file("/bucket/zoo/smartfrz-base-1.md").decode() == CARD


def test_web_servers_cannot_be_written_to():
    with pytest.raises(RegistryError, match=r"https://example.org cannot be written to; expected a folder, or hf://"):
        publish.publish(BASE, "https://example.org", publish.describe(BASE), CARD)


def test_a_predictor_without_a_card_is_not_published(tmp_path):
    with pytest.raises(
        RegistryError, match=r"has no card: .*mine\.md does not exist\. smartfrz-build train writes one"
    ):
        publish.card_of(shutil.copy(BASE, tmp_path / "mine.onnx"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    pytest.importorskip("huggingface_hub")
    folder = tmp_path_factory.mktemp("hub")
    server = ServerProcess(folder / "log", "mock_hub.py")
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(folder / "home"),
        "SMARTFRZ_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def smartfrz(*arguments, code="", **variables):
        # In a process of its own: the endpoint is read when huggingface_hub is imported.
        command = [sys.executable, "-c", code] if code else [sys.executable, "-c", COMMAND, "zoo", *map(str, arguments)]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True)

    yield server, smartfrz
    server.stop()


def test_mock_hub_publishes_and_fetches(hub, tmp_path):
    server, smartfrz = hub
    result = smartfrz("publish", BASE, "hf://org/repo", "--name", "mine", "--domain", "vision")
    assert result.stderr == ""
    assert result.stdout == ("published mine@1: smartfrz zoo download mine@1 --registry hf://org/repo/registry.json\n")
    assert smartfrz("publish", BASE, "hf://org/repo", "--name", "mine", "--version", "2").returncode == 0
    assert any("POST /api/models/org/repo/commit/main Bearer hf_test" in line for line in server.lines())

    listed = smartfrz("list", "--registry", "hf://org/repo", "--json")
    assert listed.stderr == ""
    embedded = [(e.name, e.version) for e in registry.embedded()]
    assert [(e["name"], e["version"]) for e in json.loads(listed.stdout)] == [*embedded, ("mine", "1"), ("mine", "2")]
    fetched = smartfrz("download", "mine@1", "--registry", "hf://org/repo", "-o", tmp_path / "out.onnx")
    assert fetched.stderr == ""
    assert (tmp_path / "out.onnx").read_bytes() == BASE.read_bytes()
    shown = smartfrz("show", "mine", "--registry", "hf://org/repo")
    assert CARD.splitlines()[4] in shown.stdout

    direct = smartfrz("download", "hf://org/repo/mine-1.onnx", "-o", tmp_path)
    assert direct.stderr.startswith(
        "Warning: There is no SHA-256 to compare hf://org/repo/mine-1.onnx with: it is used unver"
    )
    assert (tmp_path / "mine-1.onnx").read_bytes() == BASE.read_bytes()


PUSHED = """
import sys
from smartfrz.zoo import Predictor
base = Predictor.from_pretrained("smartfrz-base", device="cpu")
print(base.push_to_hub("org/pushed", domains=["vision"]))
print(base.push_to_hub("hf://org/pushed", version="2"))
alone = Predictor.from_pretrained("org/pushed")
print(type(alone).__module__, alone.sha256 == base.sha256, alone.path != base.path)
base.push_to_hub("org/pushed", name="other", card="# Other")
for arguments in ("org/pushed",), ("org/pushed", "mine"), ("org/pushed", "other@3"), ("smartfrz-base", "other"):
    try:
        Predictor.from_pretrained(*arguments)
    except Exception as error:
        print(type(error).__name__, error)
print(Predictor.from_pretrained("org/pushed", "smartfrz-base@1").sha256 == base.sha256)
"""


def test_mock_hub_gives_a_predictor_and_takes_it(hub):
    _, smartfrz = hub
    process = smartfrz(code=PUSHED)
    assert process.stderr == ""
    first, second, alone, several, unknown, version, no_repository, again = process.stdout.splitlines()
    assert first == second == "hf://org/pushed/registry.json"
    assert alone == "smartfrz.zoo True True"
    assert several.startswith(
        "UnknownPredictorError hf://org/pushed has 2 predictors (other, smartfrz-base); expected one where no name"
    )
    assert unknown.startswith("UnknownPredictorError unknown predictor 'mine'. Known predictors: other, smartfrz-base")
    assert version.startswith("UnknownPredictorError predictor 'other' has no version 3")
    assert no_repository.startswith("ValueError `repository` is 'smartfrz-base' and `name` is 'other'; expected org")
    assert again == "True"
    shown = smartfrz("show", "other", "--registry", "hf://org/pushed")
    assert shown.stdout.endswith("# Other\n")


def test_mock_hub_gets_a_model_card_with_metadata(hub):
    server, smartfrz = hub
    assert smartfrz("publish", BASE, "hf://org/carded", "--domain", "vision").returncode == 0
    from urllib.request import urlopen

    with urlopen(f"{server.url}/org/carded/resolve/main/README.md") as response:
        readme = response.read().decode()
    from huggingface_hub import ModelCard

    card = ModelCard(readme)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "smartfrz")
    assert card.data.tags == ["layer-freezing", "onnx", "vision"]
    auc, change = (registry.find("smartfrz-base").metrics[name] for name in ("auc", "weight_change_auc"))
    row = f"| [smartfrz-base@1](smartfrz-base-1.md) | 30 | 1024 | trajectory+loss | vision | {auc} | {change} |"
    assert row in card.content
    assert "SMARTFRZ_ZOO=hf://org/carded smartfrz zoo download smartfrz-base@1" in card.content
    assert CARD.strip() in card.content


def test_mock_hub_errors_are_told(hub):
    _, smartfrz = hub
    for target, message in {
        "hf://repo": "is no model repository; expected hf://organisation/repository",
        "hf://datasets/org/repo": "is no model repository",
    }.items():
        result = smartfrz("publish", BASE, target)
        assert message in " ".join(result.stderr.split())
        assert result.returncode == 1
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for arguments, message in {
        ("list", "--registry", "hf://org/other"): "hf://org/other/registry.json cannot be reached (ConnectError: ",
        ("publish", BASE, "hf://org/repo"): "hf://org/repo cannot be read or written (ConnectError: ",
    }.items():
        result = smartfrz(*arguments, **unreachable)
        # huggingface_hub 0 is built on requests, later ones on httpx
        assert message in " ".join(result.stderr.replace("(ConnectionError: ", "(ConnectError: ").split())
        assert result.returncode == 1
    missing = smartfrz("list", "--registry", "hf://org/nothing")
    assert "hf://org/nothing/registry.json does not exist" in missing.stderr
    assert missing.returncode == 1
