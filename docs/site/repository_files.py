"""MkDocs hook: the site also holds the files of the repository that its pages link to, under `repository/`.

So the same relative links work in the repository and on the site. A Markdown file becomes a page of its own.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDER = "repository"
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")
FIRST = ROOT / "CONTRIBUTING.md"  # the navigation names it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and the files that these link to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path] + [FIRST]
    seen = set(pages)
    files.append(File.generated(config, place(FIRST), abs_src_path=str(FIRST)))
    while pages:
        for target in linked_files(pages.pop()) - seen:
            seen.add(target)
            if target.is_relative_to(DOCS):
                continue  # MkDocs has it
            files.append(File.generated(config, place(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files so that they fit the places of the files on the site."""
    source = Path(page.file.abs_src_path)
    here = Path(place(source)).parent

    def fit(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if not target.is_file():
            return link[0]  # MkDocs warns of it
        return f"]({Path(os.path.relpath(place(target), here)).as_posix()}{link[2] or ''})"

    return LINK.sub(fit, markdown)


def linked_files(page: Path) -> set[Path]:
    """Return the files that a page links to."""
    targets = {(page.parent / target).resolve() for target, _ in LINK.findall(page.read_text(encoding="utf-8"))}
    return {target for target in targets if target.is_file()}


def place(file: Path) -> str:
    """Return the path of a file in the sources of the site."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    return f"{FOLDER}/{file.relative_to(ROOT).as_posix()}"
