"""Hooks of the site (`make docs`): handles links to sources and figures outside `docs/`.

On a forge such a link opens the file. The site has no copy of the sources, so it keeps only the
text of such a link. Figures are copied into the site, and the references become a page.
"""

import os
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIGURES = "benchmarks/results"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def references(text):
    """Formats the entries of a .bib file: key, title, authors, year, and where to find it.

    Args:
      text: of the file.

    Returns:
      Markdown, a heading for each key.
    """
    page = ["# References", "", "The keys in brackets on other pages."]
    for key, body in re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}", text, re.M | re.S):
        found = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", body, re.M))
        places = [found.get(name) for name in ("journal", "booktitle", "publisher", "note", "url")]
        parts = [found.get("author"), f"*{found['title']}*", *places, found.get("year")]
        page += ["", f"## {key}", "", ". ".join(re.sub(r"[{}]", "", p) for p in parts if p) + "."]
    return "\n".join(page) + "\n"


def on_files(files, config):
    """Adds the committed figures, and the references, to the files of the site."""
    bib = (ROOT / "docs/references.bib").read_text(encoding="utf-8")
    files.append(File.generated(config, "references.md", content=references(bib)))
    for path in sorted((ROOT / FIGURES).glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page that lead out of `docs/`.

    Raises:
      FileNotFoundError: such a link leads nowhere.
    """
    here = (ROOT / "docs" / page.file.src_uri).parent
    markdown = markdown.replace("references.bib)", "references.md)")

    def rewritten(match):
        picture, text, target, _ = match.groups()
        path = pathlib.Path(os.path.normpath(here / target))
        if path.is_relative_to(ROOT / "docs"):
            return match.group(0)
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there")
        if path.suffix == ".png":
            up = os.path.relpath(ROOT / "docs" / "figures" / path.name, here)
            return f"{picture}[{text}]({up})"
        return text

    return _LINK.sub(rewritten, markdown)
