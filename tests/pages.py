"""The pages of the documentation, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("benchmarks/README.md")]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.S | re.M)
# What a sample is about shows in what it imports.
KINDS = {"smartfrz.adapters.keras": "keras", "torch.hf": "hf", "torch.lightning": "lightning"}


class Block(NamedTuple):
    place: str
    language: str
    code: str
    why: str | None


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(f"{name_of(page)}:{line}", match["language"], match["code"], match["why"])


def samples(page):
    """The page's Python blocks that are run, each with its kind: that of the block before, unless it imports another."""
    kind = "keras" if page.name == "keras.md" else "torch"
    for block in blocks(page):
        if block.language == "python" and block.why is None:
            kind = next((k for text, k in KINDS.items() if text in block.code), kind)
            yield kind, block
