"""The file of results: several processes write to it, and damage is named."""

import subprocess
import sys

import pytest

from smartfrz.comparing.lines import add_line, matching, read_lines
from smartfrz.errors import ResultsError

WRITE = """
import pathlib, sys
from smartfrz.comparing.lines import add_line
for number in range(40):
    add_line(pathlib.Path(sys.argv[1]), {"name": sys.argv[2], "number": number, "much": "x" * 2000})
"""


def test_two_processes_add_to_one_file_and_no_line_is_lost(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = read_lines(path)
    for name in "ab":
        assert [line["number"] for line in found if line["name"] == name] == list(range(40))


@pytest.mark.parametrize("damaged", [b'{"name": "b\xff', b"3"])
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"name": "a"}\n' + damaged + b"\n")
    with pytest.raises(ResultsError, match=rf"{path}, line 2 is damaged .*expected one JSON object a line"):
        read_lines(path)


def test_without_a_file_a_line_goes_to_standard_error(capsys):
    add_line(None, {"name": "a", "number": 1})
    assert capsys.readouterr() == ("", '{"name": "a", "number": 1}\n')


def test_lines_are_found_by_their_facts():
    lines = [{"name": "a", "settings": {"x": 1}, "y": 1}, {"name": "a", "settings": {}, "y": 2}]
    assert matching(lines, {"name": "a", "settings": {}}) == lines[1:]
    assert matching(lines, {}) == lines
    assert matching(lines, {"z": None}) == []
