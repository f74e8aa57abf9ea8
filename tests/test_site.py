"""The documentation site: it builds without a warning, every link arrives, nothing is loaded from elsewhere, its snippets run."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from spikellm.config.help import describe
from spikellm.config.schema import Config

pytest.importorskip("mkdocs", reason="the site's builder is not installed: the extra `docs`")
PROJECT_ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
DOCS = PROJECT_ROOT / "docs"
LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "use": "href"}  # element -> what it fetches
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# Relations of <link> that a browser fetches nothing for.
MENTIONED = {"next", "prev", "canonical", "license", "alternate"}


class Page(HTMLParser):
    """What a page links to, what it loads, its anchors and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.elements: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.add(tag)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADING and found.get(LOADING[tag]) and found.get("rel") not in MENTIONED:
            self.loads.append(found[LOADING[tag]])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built once, whichever processes its tests are run by."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            build(folder)
    return folder


def build(folder: Path) -> None:
    making = folder.with_suffix(".part")
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(making)],
        cwd=PROJECT_ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr == ""
    making.rename(folder)


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    # the page for what is not found is served from anywhere, with links from the root
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def local(path: Path, link: str) -> tuple[Path, str] | None:
    """File and anchor that a link on the page at `path` leads to; None: it leads out of the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    assert not parts.path.startswith("/"), f"{path}: {link} depends on where the site lies"
    return ((path.parent / unquote(parts.path)).resolve() if parts.path else path), unquote(parts.fragment)


def test_every_link_arrives_and_every_page_is_reached(pages):
    dead, reached = [], set()
    for path, page in pages.items():
        for link in page.links:
            if (target := local(path, link)) is None:
                continue
            file, anchor = target
            reached.add(file)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{path.name}: {link}")
    assert not dead
    assert set(pages) <= reached


def test_it_is_read_without_a_network(site, pages):
    for path, page in pages.items():
        for load in page.loads:
            target = local(path, load)
            assert target is not None, f"{path.name} loads {load}"
            assert target[0].is_file(), f"{path.name} loads {load}, which is not there"
    for style in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import\s)\s*[\"']?([^\"')\s]+)", style.read_text(encoding="utf-8"))
        assert not [each for each in fetched if not each.startswith(("data:", "#", "%23"))], style.name
    assert (site / "search" / "search_index.js").is_file()  # a page that was opened as a file cannot fetch the .json


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_pages_that_are_opened_as_files_are_searched(site, tmp_path):
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}",
         "--virtual-time-budget=20000", "--dump-dom", f"{(site / 'index.html').as_uri()}?q=synaptic"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert re.search(r"\d+ matching documents", Page(found.stdout).text), found.stderr


def test_formulas_are_drawn_by_the_browser(pages):
    method = next(page for path, page in pages.items() if path.name == "method.html")
    assert "math" in method.elements
    assert not [path for path, page in pages.items() if "arithmatex" in path.read_text(encoding="utf-8") or "\\frac" in page.text]


def test_the_pages_have_what_they_are_made_of(site, pages):
    listed = (DOCS / "studies.md").read_text(encoding="utf-8")
    text = {path.relative_to(site).as_posix(): page.text for path, page in pages.items()}
    for name, _, _, _ in describe(Config):
        assert name in text["configuration.html"]
    for path in (PROJECT_ROOT / "conf").glob("*/*.yaml"):
        assert path.stem in text["configuration.html"]
    for path in (PROJECT_ROOT / "experiments").glob("*/README.md"):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title in text[f"studies/{path.parent.name}/index.html"]
        assert f"(studies/{path.parent.name}/README.md)" in listed, f"{path.parent.name} has no row in docs/studies.md"
    for room in (PROJECT_ROOT / "spikellm").glob("*/__init__.py"):
        for path in set(room.parent.glob("*.py")) - {room}:
            assert path.stem in text[f"rooms/{room.parent.name}.html"]


def test_the_public_names_are_explained(site, pages):
    import spikellm

    page = pages[site / "api.html"]
    for name in spikellm.__all__:
        assert any(anchor.endswith(f".{name}") for anchor in page.anchors), name


def test_the_neuron_on_the_page_is_what_it_says(capsys):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    snippet, after = text.partition("```python\n")[2].split("```")[:2]
    exec(compile(snippet, "python.md", "exec"), {})
    assert f"prints `{capsys.readouterr().out.strip()}`" in after
