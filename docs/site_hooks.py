"""Takes files of the repository that are outside of docs/ into the site, and keeps links to them working.

A page in docs/ links to `../benchmarks/README.md`, which is right in the repository. On the site the folder docs/ is the
root, so the same link loses one `../`.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "smartfrz/zoo/*.md")
OUTSIDE += ("benchmarks/pictures/*.png", "examples/*.*", "examples/notebooks/*.ipynb", "examples/serving/*")
OUTSIDE += ("requirements/*.txt", "dataset/*.md")
LINK = re.compile(r"(\]\()((?:\.\./)*)([^):#\s]*)")


def on_files(files, config):
    """Add the files outside of docs/, at their paths in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between docs/ and the rest of the repository into links of the site."""
    source = page.file.src_uri
    inside = (ROOT / "docs" / source).exists()
    here = Path("docs", source).parent if inside else Path(source).parent

    def rewrite(match):
        start, up, rest = match.groups()
        target = _normal(here / up / rest) if up or rest else None
        if target is None or not (ROOT / target).is_file():
            return match[0]
        on_site = target.relative_to("docs") if target.is_relative_to("docs") else target
        if target == Path("README.md"):
            on_site = Path("index.md")
        return start + "../" * source.count("/") + on_site.as_posix()

    return LINK.sub(rewrite, markdown)


def _normal(path):
    parts = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return Path(*parts)
