"""What docs/serving.md gives to users of the server: `--example`, the start page, examples/serving."""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from serving_process import ServingProcess

if not importlib.util.find_spec("kserve"):  # not imported: its protobuf names are those of tritonclient
    pytest.skip("kserve is not installed", allow_module_level=True)

import smartfrz
from smartfrz import zoo
from smartfrz.cli import main
from smartfrz.zoo import registry

KIT = Path(__file__).parent.parent / "examples" / "serving"
NAME = "smartfrz-base"
HEARING = "hearing"
needs_the_kit = pytest.mark.skipif(not KIT.exists(), reason="the examples are not here")


@pytest.fixture(scope="module")
def served(predictor_file, loss_predictor_file):
    """The predictor that is shipped, one that reads nothing but weights, and one that reads losses; name and place."""
    return {NAME: NAME, "tiny": predictor_file, HEARING: loss_predictor_file}


@pytest.fixture(scope="module")
def server(tmp_path_factory, served):
    process = ServingProcess(tmp_path_factory.mktemp("kit") / "log", *named(served).values())
    yield process
    process.kill()


@pytest.fixture(scope="module", params=[NAME, HEARING])
def asked(request, served, tmp_path_factory):
    """The name of a predictor, a request in a file, and the answer of the predictor itself."""
    predictor, rng = zoo.load(served[request.param], device="cpu"), np.random.default_rng(0)
    size = predictor.info.tailored_size
    speed = np.logspace(-1, -7, 5)[:, None, None]
    steps = (speed * rng.normal(size=(5, 10, size))).cumsum(axis=1)
    history = (0.05 * rng.normal(size=(5, 1, size)) + steps).astype(np.float32)
    lengths, position = np.array([10, 10, 4, 10, 10]), np.linspace(0, 1, 5, dtype=np.float32)
    loss = np.tile(np.linspace(2, 1, 10, dtype=np.float32), (5, 1))
    loss[:, 1] = 0  # not known
    layers, path = [f"block.{number}" for number in range(5)], tmp_path_factory.mktemp("request") / "request.json"
    arrays = {"history": history, "lengths": lengths, "position": position, "loss": loss}
    path.write_text(json.dumps({"layers": layers} | {key: array.tolist() for key, array in arrays.items()}))
    read = (position, loss) if predictor.reads_loss else (position,)
    confidence = predictor.predict(history, lengths, *read).confidence[:, 1]
    for used in range(len(read)):  # what is left out matters
        apart = np.abs(confidence - predictor.predict(history, lengths, *read[:used]).confidence[:, 1]).max()
        assert apart > (0.1 if request.param == NAME and not used else 1e-4)
    return request.param, path, layers, confidence, predictor.info


def named(served):
    """What to give to `smartfrz serve` for each predictor."""
    return {name: name if name == place else f"{name}={place}" for name, place in served.items()}


def example(*arguments):
    result = CliRunner().invoke(main, ["serve", *map(str, arguments), "--example"])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", [NAME, "tiny", HEARING])
def test_the_example_works_when_it_is_pasted(server, served, name):
    for program in ("sh", "awk", "curl"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    code, text, remark = example(named(served)[name], "--port", server.port)
    assert code == 0
    predictor = zoo.load(served[name], device="cpu")
    assert ("position" in text, "loss" in text) == (predictor.positional, predictor.reads_loss)
    assert "the first one stands still, the second one moves" in remark
    result = subprocess.run(["sh"], input=text, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["model_name"] == name
    (output,) = answer["outputs"]
    assert (output["name"], output["shape"]) == ("confidence", [2, 2])
    if name == NAME:
        (_, still), (_, moving) = np.reshape(output["data"], (2, 2))
        assert still > 0.5
        assert moving < 0.3


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ((), "http://127.0.0.1:8080/"),
        (("--host", "0.0.0.0", "--port", 9000), "http://127.0.0.1:9000/"),
        (("--host", "::1"), "http://[::1]:8080/"),
        (("--host", "predictors.example.org"), "http://predictors.example.org:8080/"),
    ],
)
def test_the_example_asks_the_address_of_the_options(predictor_file, options, address):
    code, text, _ = example(predictor_file, "other=smartfrz-tiny", *options)
    assert code == 0
    assert [line.split()[-1] for line in text.splitlines() if "curl" in line] == [
        f"{address}v2/models/{name}/infer" for name in ("tiny", "other")
    ]


def test_the_example_needs_an_address(predictor_file):
    code, _, error = example(predictor_file, "--port", 0)
    assert code == 2
    assert "--port is 0, so the address is not known. Pass the port that the server printed." in error
    result = CliRunner().invoke(main, ["serve", str(predictor_file), "--example", "--json"])
    assert list(json.loads(result.stdout)["commands"]) == ["tiny"]


def test_the_start_page_says_what_this_is(server):
    status, page = server.get("/")
    assert status == 200
    assert (page["name"], page["version"]) == ("smartfrz", smartfrz.__version__)
    assert "Open Inference Protocol" in page["description"]
    assert [model["name"] for model in page["models"]] == [NAME, "tiny", HEARING]
    for path in page["links"].values():
        assert server.request("GET", path)[0] == 200
    for model in page["models"]:
        assert server.get(model["metadata"])[1]["versions"] == [model["version"]]
        assert server.get(model["ready"])[1]["ready"] is True
        assert server.request("POST", model["infer"], b"{}")[0] == 400


def test_one_checksum_is_listed_and_served(server, served):
    entry = registry.find(NAME)
    told = {model["name"]: model["sha256"] for model in server.get("/")[1]["models"]}
    files = {name: place for name, place in served.items() if name != NAME}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert told == {NAME: entry.sha256} | sums
    described = server.get(f"/v2/models/{NAME}")[1]
    assert described["properties"]["smartfrz.sha256"] == entry.sha256
    (version,) = described["versions"]
    listed = CliRunner().invoke(main, ["zoo", "list"]).stdout
    assert version in next(line for line in listed.splitlines() if line.startswith(f"{NAME}@"))


CLIENTS = {"REST": "client_rest.py", "gRPC": "client_grpc.py", "JavaScript": "client.mjs"}


def ask(client, server, name, *arguments):
    """Run a client of the kit without any of our code, and return its answers."""
    if client == "JavaScript" and not shutil.which("node"):
        pytest.skip("needs node")
    if client == "gRPC" and not importlib.util.find_spec("tritonclient"):
        pytest.skip("needs tritonclient")
    # Python isolated: no import path of ours.
    program = ["node"] if client == "JavaScript" else [sys.executable, "-I", "-W", "always"]
    address = f"127.0.0.1:{server.grpc_port}" if client == "gRPC" else f"http://127.0.0.1:{server.port}"
    result = subprocess.run(
        [*program, KIT / CLIENTS[client], address, name, *arguments], capture_output=True, text=True, env=os.environ
    )
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_the_kit
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_the_answers_of_the_predictor(client, server, asked):
    name, path, layers, confidence, info = asked
    rows = ask(client, server, name, path)
    if client != "gRPC":
        assert rows.pop(0) == {"predictor": info.name, "threshold": info.threshold}
        assert [row["freeze"] for row in rows] == [row["confidence"] >= info.threshold for row in rows]
    assert [row["layer"] for row in rows] == layers
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, atol=1e-6)


@needs_the_kit
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_without_a_request_makes_one_up(client, server):
    still, moving = ask(client, server, NAME)[-2:]
    assert still["confidence"] > 0.5
    assert moving["confidence"] < 0.3
    assert [row["layer"] for row in ask(client, server, HEARING)[-2:]] == ["still", "moving"]


@needs_the_kit
def test_the_clients_use_nothing_of_ours():
    for name in CLIENTS.values():
        code = [line for line in (KIT / name).read_text("utf-8").splitlines() if line.startswith(("import", "from"))]
        assert code
        assert not [line for line in code if "smartfrz" in line]


def instructions():
    """The Dockerfile's instructions, by name; lines that go on are joined."""
    text = (KIT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


@needs_the_kit
def test_the_container_has_what_it_copies_and_starts_what_exists():
    found = instructions()
    root = KIT.parent.parent
    copied = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "smartfrz"} <= set(copied)  # what hatchling reads
    assert all((root / source).exists() for source in copied)
    by_name = dict(found)
    program, *arguments = json.loads(by_name["ENTRYPOINT"]) + json.loads(by_name["CMD"])
    assert program == "smartfrz"
    assert CliRunner().invoke(main, [*arguments, "--example"]).exit_code == 0
    assert by_name["USER"].isdigit()


@needs_the_kit
def test_the_check_of_health_sees_a_server(server):
    """The Dockerfile's HEALTHCHECK, at the port of the server here."""
    text = dict(instructions())["HEALTHCHECK"]
    _, *arguments = json.loads(text[text.index("[") :])
    for port, works in ((server.port, True), (1, False)):
        command = [sys.executable, *(argument.replace(":8080", f":{port}") for argument in arguments)]
        assert (subprocess.run(command, capture_output=True).returncode == 0) == works


@needs_the_kit
def test_the_inference_service_starts_what_exists(server):
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((KIT / "inferenceservice.yaml").read_text("utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (container,) = service["spec"]["predictor"]["containers"]
    assert CliRunner().invoke(main, ["serve", *container["args"], "--example"]).exit_code == 0
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    for probe in ("readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["port"] == port["containerPort"]
        assert server.request("GET", get["path"])[0] == 200


def test_names_are_quoted_nowhere_since_they_need_none(predictor_file):
    _, text, _ = example(f"a-b.c_1={predictor_file}")
    assert shlex.split(text)[-1] == "http://127.0.0.1:8080/v2/models/a-b.c_1/infer"
