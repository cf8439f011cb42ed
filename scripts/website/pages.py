"""Hooks of MkDocs for the site of `docs/`: pages beside that folder, links and code as the site needs them.

In the repository links are those of a code host, relative to their file. On the site a link to a page of the site
leads there; one to another file of the repository becomes the path of that file.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

ROOT = Path(__file__).parents[2]
# Pages that lie beside docs/, and what they are called on the site: a README.md there would be its first page.
BESIDE = {f"{name}.md": f"{name.lower()}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")}
# In a search the pages that tell of these come first; TUNING.md, which is numbers alone, is not found.
_FOUND_LATER = ("studies/", "changelog.md", "contributing.md")
_CODE = r"^ *```.*?^ *```|`[^`\n]*`"
_INLINE = re.compile(r"(?<!<pre>)(?<!<span></span>)<code>[^<]*</code>")
_PART = re.compile(r"(?P<flag>(?<![\w-])--?[a-z][\w-]*)|(?<=\w)(?:[/=(]+(?=\w)|\.(?=[A-Za-z]\w{3}))")
_LINK = re.compile(rf'{_CODE}|\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)|src="(?P<src>[^"]+)"', re.DOTALL | re.MULTILINE)


def slug(title: str, separator: str) -> str:
    """The anchor of a heading, as GitHub makes it, but for the second of two alike."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def site_links(text: str, source: str) -> str:
    """The text of a page with its links as the site needs them; code stays as it is.

    Args:
        text: Markdown.
        source: path of the page in the repository.
    """
    page = _on_site(source) or source

    def replace(match: re.Match[str]) -> str:
        link = match["to"] or match["src"]
        if link is None or re.match(r"[a-z]+:|#", link):
            return match[0]
        path, _, anchor = link.partition("#")
        target = normpath(f"{dirname(source)}/{path}".lstrip("/"))
        to = _on_site(target)
        if to is None and not (ROOT / target).exists():
            return match[0]  # for MkDocs to complain of
        if to is None:
            is_said = match["text"].strip("`/") == target
            return match["text"] if is_said else f"{match['text']} (`{target}`)"
        link = relpath(to, dirname(page) or ".") + (f"#{anchor}" if anchor else "")
        return f"[{match['text']}]({link})" if match["to"] else f'src="{link}"'

    return _LINK.sub(replace, text)


def _on_site(path: str) -> str | None:
    """Where a file of the repository, or a folder with a README, is on the site; None: nowhere."""
    if path in BESIDE:
        return BESIDE[path]
    if path.startswith("docs/") and (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    return path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None


def breaking(html: str) -> str:
    """HTML whose inline code may break where a part of a name ends (`<wbr>`), not in a flag (`class="flag"`)."""
    return _INLINE.sub(lambda code: _PART.sub(_marked, code[0]), html)


def _marked(part: re.Match[str]) -> str:
    return f'<span class="flag">{part[0]}</span>' if part["flag"] else f"{part[0]}<wbr>"


# ---- what MkDocs calls ----


def on_config(config: Any) -> None:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for source, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    beside = {name: source for source, name in BESIDE.items()}
    uri = page.file.src_uri
    if uri == "index.md":
        page.meta["hide"] = ["navigation"]  # which would name this page alone
    if uri.startswith(_FOUND_LATER):
        page.meta["search"] = {"exclude": True} if uri.endswith("TUNING.md") else {"boost": 0.3}
    return site_links(markdown, beside.get(uri, f"docs/{uri}"))


def on_page_content(html: str, **_: Any) -> str:
    return breaking(html)
