"""Programs on a terminal."""

import os
import pty
import subprocess


def run_on_a_terminal(command):
    """Run a program whose errors go to a terminal. Return what was drawn, its output, and its exit code."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=os.environ | {"TERM": "xterm"})
    os.close(end)
    drawn = b""
    while True:
        try:
            part = os.read(terminal, 2**16)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        drawn += part
    os.close(terminal)
    return drawn, process.communicate()[0].decode(), process.returncode
