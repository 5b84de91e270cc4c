"""A real web server in a process of its own, and registries for it."""

import subprocess
import sys
from pathlib import Path

from smartfrz.zoo import publish, registry


class ServerProcess:
    """One of our server scripts, run with its arguments; for example `zoo_server.py` and a folder.

    Attributes:
        url: Address, without a slash at its end.
    """

    def __init__(self, log, script, *arguments):
        self._log = log
        command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output)
        while not (lines := log.read_text().splitlines()):
            if self._process.poll() is not None:
                raise RuntimeError("the server did not start")
        self.url = f"http://127.0.0.1:{lines[0]}"

    def requests(self, mode):
        """Return the Range headers of all requests for a mode, "-" where there is none."""
        lines = [line.split() for line in self.lines()]
        return [line[2] for line in lines if line[1].startswith(f"/{mode}/") and line[1].endswith(".onnx")]

    def lines(self):
        """Return every request as the server printed it."""
        return self._log.read_text().splitlines()[1:]

    def stop(self):
        self._process.kill()
        self._process.wait()


def write_registry(folder, predictor, server, mode="plain", name="tiny-zoo", **changes):
    """Write a local registry whose only entry is on a server, and return its path."""
    entry = publish.describe(predictor, name=name)
    address = f"{server.url}/{mode}/{entry.file}"
    values = {**vars(entry), "url": address, **changes}
    path = folder / f"{mode}.json"
    path.write_bytes(registry.serialise([registry.Entry(**values)]))
    return path
