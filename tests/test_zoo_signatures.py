"""Signatures over registries, as minisign makes them."""

import base64
import hashlib
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from zoo_fixtures import ServerProcess

from smartfrz.cli import main
from smartfrz.errors import DownloadError, MissingDependencyError, RegistryError
from smartfrz.zoo import embedded_folder, publish, registry, signatures

BASE = embedded_folder() / "smartfrz-base.onnx"
ADDRESS = "https://example.org/registry.json"
# A published test vector: the signature of "test" by minisign.
PUBLIC = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
SIGNATURE = b"""untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1633700835\tfile:test\tprehashed
wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==
"""
WRONG_KEYS = ["", "RW", "x" * 56, PUBLIC[:-1], PUBLIC + "AAAA", "RUQ" + PUBLIC[3:], "\x1b[2J", "sha256=" + "a" * 64]
# What is changed in the signature, and what the error says
WRONG_SIGNATURES = {
    "empty": (lambda s: b"", "is damaged"),
    "a page": (lambda s: b"<html>\n<body>\n</body>\n</html>\n", "is damaged"),
    "no text": (lambda s: b"\xff" * 300, "is damaged"),
    "cut": (lambda s: s[:150], "is damaged"),
    "another algorithm": (lambda s: s.replace(b"RUQf", b"AAAf"), "is damaged"),
    "another key": (lambda s: s.replace(b"RUQf6LRC", b"RUQf6LRD"), "is by key .*; expected E7620F1842B4E81F"),
    "another signature": (lambda s: s.replace(b"559r3g7V", b"559r3g7W"), "is not over this content"),
    "another comment": (lambda s: s.replace(b"1633700835", b"1933700835"), "is not over this content"),
    "no comment": (lambda s: s.replace(b"trusted comment: t", b"trusted remark: t"), "is damaged"),
    "prehashed or not": (lambda s: s.replace(b"RUQf", b"RWQf"), "is not over this content"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.setenv("SMARTFRZ_CACHE", str(tmp_path / "cache"))
    for name in ("SMARTFRZ_ZOO", "SMARTFRZ_OFFLINE", "SMARTFRZ_LOCK"):
        monkeypatch.delenv(name, raising=False)


class Signer:
    """Signs as minisign does."""

    def __init__(self):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._secret = Ed25519PrivateKey.generate()
        self.public = base64.b64encode(b"Ed" + bytes(8) + self._secret.public_key().public_bytes_raw()).decode()

    def sign(self, path):
        signature = self._secret.sign(hashlib.blake2b(path.read_bytes()).digest())
        comment = "timestamp:1\tfile:registry.json"
        lines = [
            "untrusted comment: test",
            base64.b64encode(b"ED" + bytes(8) + signature).decode(),
            f"trusted comment: {comment}",
            base64.b64encode(self._secret.sign(signature + comment.encode())).decode(),
        ]
        path.with_name(f"{path.name}.minisig").write_text("\n".join(lines) + "\n")


@pytest.fixture
def signer():
    return Signer()


@pytest.fixture
def served(tmp_path, signer):
    """A folder with a signed registry, on a server."""
    folder = tmp_path / "served"
    publish.add(BASE, folder, publish.describe(BASE, name="mine"), "# card\n")
    signer.sign(folder / "registry.json")
    server = ServerProcess(tmp_path / "log", "zoo_server.py", folder)
    server.folder = folder
    server.address = f"{server.url}/plain/registry.json"
    yield server
    server.stop()


def smartfrz(*arguments):
    return CliRunner().invoke(main, ["zoo", *map(str, arguments)])


def test_a_signature_of_minisign_is_read():
    place, key = signatures.split(f"{ADDRESS}#minisign={PUBLIC}")
    assert place == ADDRESS
    assert signatures.verify(b"test", SIGNATURE, key, ADDRESS) == "timestamp:1633700835 file:test prehashed"
    with pytest.raises(RegistryError, match="is not over this content: the registry was changed after it was signed"):
        signatures.verify(b"Test", SIGNATURE, key, ADDRESS)
    assert signatures.split("folder/registry.json") == ("folder/registry.json", None)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="signs with minisign")
@pytest.mark.parametrize("options", [[], ["-l"]])
def test_what_minisign_signs_here_is_read(options, tmp_path):
    path, secret, public = (tmp_path / name for name in ("registry.json", "minisign.key", "minisign.pub"))
    path.write_bytes(b"content")
    subprocess.run(["minisign", "-G", "-W", "-p", public, "-s", secret], check=True, capture_output=True)
    subprocess.run(["minisign", "-S", *options, "-m", path, "-s", secret], check=True, capture_output=True)
    key = signatures.split(f"#minisign={public.read_text().splitlines()[1]}")[1]
    assert "registry.json" in signatures.verify(b"content", (tmp_path / "registry.json.minisig").read_bytes(), key, "x")


@pytest.mark.parametrize("case", WRONG_SIGNATURES)
def test_wrong_signatures(case):
    change, message = WRONG_SIGNATURES[case]
    key = signatures.split(f"#minisign={PUBLIC}")[1]
    assert change(SIGNATURE) != SIGNATURE
    with pytest.raises(RegistryError, match=rf"The signature of the registry {ADDRESS} {message}"):
        signatures.verify(b"test", change(SIGNATURE), key, ADDRESS)


@pytest.mark.parametrize("text", WRONG_KEYS)
def test_wrong_keys(text):
    with pytest.raises(DownloadError, match=r"is no public key of minisign; expected 56 characters that begin with RW"):
        signatures.split(f"{ADDRESS}#minisign={text}")


def test_a_signed_registry_is_used_and_an_altered_one_is_not(served, signer):
    location = f"{served.address}#minisign={signer.public}"
    altered = served.folder / "registry.json"
    honest = altered.read_bytes()
    altered.write_bytes(honest.replace(b"mine", b"evil"))
    with pytest.raises(RegistryError, match="is not over this content"):
        registry.find("evil", [location])
    altered.write_bytes(honest)
    assert str(registry.find("mine", [location])) == "mine@1"
    assert registry.find("mine", [location]).address == f"{served.url}/plain/mine-1.onnx"


def test_the_last_copy_with_a_good_signature_is_used(served, signer, tmp_path, monkeypatch, caplog):
    location = f"{served.address}#minisign={signer.public}"
    registry.find("mine", [location])
    Signer().sign(served.folder / "registry.json")
    assert str(registry.find("mine", [location])) == "mine@1"
    assert "is not over this content" in caplog.messages[0]
    (served.folder / "registry.json.minisig").unlink()
    assert str(registry.find("mine", [location])) == "mine@1"
    assert "has no signature, and its address asks for one" in caplog.messages[1]
    monkeypatch.setenv("SMARTFRZ_OFFLINE", "1")
    assert str(registry.find("mine", [location])) == "mine@1"
    (copy,) = (tmp_path / "cache" / "registries").glob("*.json")
    copy.write_bytes(copy.read_bytes().replace(b"mine", b"evil"))
    with pytest.raises(DownloadError, match="SMARTFRZ_OFFLINE is set"):
        registry.find("evil", [location])


def test_a_registry_without_a_signature(served, signer):
    (served.folder / "registry.json.minisig").unlink()
    with pytest.raises(RegistryError, match="has no signature, and its address asks for one"):
        registry.find("mine", [f"{served.address}#minisign={signer.public}"])
    assert str(registry.find("mine", [served.address])) == "mine@1"


def test_verify_signatures(served, signer, monkeypatch):
    good = f"{served.address}#minisign={signer.public}"
    result = smartfrz("verify", "--signatures", good)
    assert (result.exit_code, result.stdout) == (0, f"ok   {served.address}  timestamp:1 file:registry.json\n")
    by_path = f"{served.folder}#minisign={signer.public}"
    monkeypatch.setenv("SMARTFRZ_ZOO", f"{good} {served.address} {by_path} {served.address}#minisign={Signer().public}")
    result = smartfrz("verify", "--signatures")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok", "bad", "ok", "bad"]
    assert "There is no key to compare the signature" in result.stdout
    assert "2 without a good signature" in result.stderr
    assert result.exit_code == 1
    # A good copy in the cache does not hide that the answer is bad now.
    registry.find("mine", [good])
    (served.folder / "registry.json").write_text("{}")
    assert "is not over this content" in smartfrz("verify", "--signatures", good).stdout
    monkeypatch.delenv("SMARTFRZ_ZOO")
    assert smartfrz("verify", "--signatures").exit_code == 2


def test_without_cryptography(served, signer, monkeypatch):
    for name in ("cryptography.exceptions", "cryptography.hazmat.primitives.asymmetric.ed25519"):
        monkeypatch.setitem(sys.modules, name, None)
    assert str(registry.find("mine", [served.address])) == "mine@1"
    with pytest.raises(MissingDependencyError, match=r'pip install "smartfrz\[signatures,cpu\]"'):
        registry.find("mine", [f"{served.address}#minisign={signer.public}"])
