"""A hook of mkdocs, for what the site holds beside docs/.

- README is the first page; CONTRIBUTING and CHANGELOG are pages.
- A link to another file of the repository, such as `../hub_cards/images/toy.png`, leads to a copy below `files/`.
- The page of commands shows what `--help` prints (training/help).
- A link that leads nowhere ends the build.
"""

import posixpath
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
COMMANDS = "docs/reference/commands.md"
LINK = re.compile(r"(\]\((?!\w+:))([^)#\s]+)")
DIFFUSION = ("diffusion", "cdm")
WORDS = {"prepare_data": "prepare", "train_toy": "toy"}


def place_on_the_site(target):
    """The site's path of a file of the repository: a page's, or that of a copy."""
    if target in PAGES:
        return PAGES[target]
    inside = posixpath.relpath(target, "docs")
    return f"files/{target}" if inside.startswith("..") else inside


def with_links_of_the_site(text, page):
    """The text of the repository's file `page` with the site's links, and the files to which these lead."""
    start = posixpath.dirname(place_on_the_site(page)) or "."
    copies = set()

    def moved(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        if not (ROOT / target).is_file():
            raise PluginError(f"{page} links to {match[2]}, and {target} is not a file")
        place = place_on_the_site(target)
        if place.startswith("files/"):
            copies.add(target)
        return match[1] + posixpath.relpath(place, start)

    return LINK.sub(moved, text), copies


def pages_of_help():
    """One section for each text of `--help`: first the commands, then the methods' own options."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "training/help").glob("*.txt")}
    methods = [
        name for name in texts if (ROOT / f"cm_diffusers/objectives/{name}.py").is_file() or name in ("sct", "scd")
    ]
    sections = {f"cm-diffusers {WORDS.get(name, name)}": name for name in texts if name not in (*methods, "training")}
    train = {"Options of all methods": "training"}
    for name in methods:
        train[f"cm-diffusers {'diffuse' if name in DIFFUSION else 'train'} --method {name}"] = name
    return "".join(
        f"\n## {title}\n\n```text\n{texts[name].rstrip()}\n```\n" for title, name in (train | sections).items()
    )


def on_files(files, config):
    pages = {file.src_uri for file in files.documentation_pages()}
    copies = set()
    for name in [*PAGES, *(f"docs/{page}" for page in sorted(pages))]:
        text, wanted = with_links_of_the_site((ROOT / name).read_text(encoding="utf-8"), name)
        copies |= wanted
        if name == COMMANDS:
            text += pages_of_help()
        place = place_on_the_site(name)
        if place in pages:
            files.remove(files.get_file_from_path(place))
        files.append(File.generated(config, place, content=text))
    for name in sorted(copies):
        files.append(File.generated(config, f"files/{name}", content=(ROOT / name).read_bytes()))
    return files


def on_post_build(config):
    """mkdocs checks links between Markdown files; this checks all links of the finished pages, with their anchors."""
    site = Path(config.site_dir).resolve()
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {
        path: set(map(unescape, re.findall(r'\b(?:id|name)="?([^"\s>]+)', text))) for path, text in texts.items()
    }
    wrong = []
    for page, text in texts.items():
        for link in sorted(set(map(unescape, re.findall(r'\b(?:href|src)="?([^"\s>]+)', text)))):
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            path = (page.parent / unquote(target.partition("?")[0])).resolve() if target else page
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file() or (anchor and path in anchors and unquote(anchor) not in anchors[path]):
                wrong.append(f"{page.relative_to(site)} -> {link}")
    if wrong:
        raise PluginError("links that lead nowhere:\n" + "\n".join(wrong))
