"""Run a command in a network namespace without routes, and write the names that it looked up to a file.

python watched_network.py FILE COMMAND ...

Run it under `unshare --map-root-user --net --mount`. The only host of that network is this machine, and the only name
server is in this process: it knows no name. C and C++ code in dependencies is watched as well, which hooks in Python
would not see.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41
NO_SUCH_NAME = b"\x81\x83"


def bring_up_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP_AND_RUNNING))


def replace_name_server():
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("nameserver 127.0.0.1\n")
        file.flush()
        subprocess.run(["mount", "--bind", file.name, "/etc/resolv.conf"], check=True)


def answer(server, names):
    """Refuse each question, and note its name."""
    while True:
        question, client = server.recvfrom(4096)
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode("ascii", "replace"))
            at += 1 + question[at]
        names.add(".".join(labels))
        server.sendto(question[:2] + NO_SUCH_NAME + question[4:6] + bytes(6) + question[12 : at + 5], client)


def main():
    bring_up_loopback()
    replace_name_server()
    names = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        threading.Thread(target=answer, args=(server, names), daemon=True).start()
        code = subprocess.run(sys.argv[2:]).returncode
        Path(sys.argv[1]).write_text(json.dumps(sorted(names)))
    sys.exit(code)


if __name__ == "__main__":
    main()
