"""Build the site without Quarto: nbdev's processors, then smalldocs, both from nbs/_quarto.yml.

    python scripts/build_docs.py [--out _docs] [--force]

Only notebooks that changed are processed again (`_proc/` is the cache). Broken links, dead anchors, missing pictures,
pages listed in the sidebar that don't exist and pages that nothing links to end the build with exit code 1; the site
is written all the same, so that it can be looked at.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
_NAME_LINK = re.compile(r"(\]\(/?)([\w./-]+\.html)#([\w.]+)\)")
_NOTEBOOK_LINK = re.compile(r"(\]\()([^)\s]+?\.ipynb)(#[^)\s]*)?(\))")


# ---------------------------------------------------------------- nbdev: show the documentation of exported names


def _half_written(path: Path) -> bool:
    "Whether a build was killed while it wrote this notebook."
    try:
        return not json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True


def process_notebooks(
    force: bool = False,  # Process every notebook again
) -> Path:  # The folder with the processed notebooks
    "Run nbdev's processors. They execute the imports and the exported cells of each notebook, in the smallest profile."
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["DSC_PROFILE"] = "tiny"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(SCRIPTS))
    os.chdir(ROOT)
    from nbdev.serve import proc_nbs

    cache = ROOT / "_proc"
    sources = [SCRIPTS / "doc_procs.py", ROOT / "pyproject.toml"]
    if cache.exists() and cache.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        force = True
    force = force or any(map(_half_written, cache.glob("**/*.ipynb")))
    return proc_nbs(str(ROOT / "nbs"), n_workers=min(4, os.cpu_count() or 1), force=force)


# ---------------------------------------------------------------- stage the pages under the names of the site


def site_name(
    name: str,  # A notebook, such as `01_data.formats.ipynb`, perhaps in a folder
) -> str:  # Its name on the site, such as `data.formats.ipynb`
    "nbdev's rule: a page has no number and is lower case."
    path = Path(name)
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.name.lower())).as_posix()


def _site_link(found):
    before, target, anchor, after = found.groups()
    if re.match(r"[a-z]+:", target):
        return found[0]
    return before + site_name(target) + (anchor or "").lower() + after


def documented(
    processed: Path,  # Where nbdev left the notebooks
) -> dict[str, set[str]]:  # Page of the site -> anchors of the names that it documents
    "Which names have an entry: nbdev links every name that it knows, methods too, and not all have one."
    anchors = {}
    for path in processed.rglob("*.ipynb"):
        page = Path(site_name(path.relative_to(processed).as_posix())).with_suffix(".html").as_posix()
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [o.get("data", {}).get("text/markdown", "") for c in cells for o in c.get("outputs", [])]
        text = "\n".join("".join(output) for output in outputs)
        anchors[page] = {name.strip().lower() for name in re.findall(r"(?m)^#+ (.+)$", text)}
    return anchors


def site_links(
    text: str,  # Markdown of a processed notebook
    anchors: dict[str, set[str]],  # From `documented`
) -> str:  # Markdown for the site
    "Point links to notebooks at their pages, and links to a name without an entry at its class or its page."

    def rewrite(found):
        before, page, name = found.groups()
        known = anchors.get(page)
        near = next((n for n in (name, name.split(".")[0]) if known is None or n in known), "")
        return f"{before}{page}{'#' * bool(near)}{near})"

    return _NAME_LINK.sub(rewrite, _NOTEBOOK_LINK.sub(_site_link, text))


def stage_page(
    source: Path,  # A processed notebook
    target: Path,  # Where it goes
    anchors: dict[str, set[str]],  # From `documented`
) -> None:
    "Copy a notebook with its links changed to what they are on the site."
    from fastcore.nbio import read_nb, write_nb

    notebook = read_nb(source)
    for cell in notebook.cells:
        if cell.cell_type == "raw":
            cell.source = re.sub(r"(?m)^output-file:.*\n", "", cell.source)  # the file already has that name
        if cell.cell_type == "markdown":
            cell.source = site_links(cell.source, anchors)
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown")
            if text:
                output["data"]["text/markdown"] = site_links("".join(text), anchors)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, target)


def rename_entries(
    entry: object,  # A part of `website:` in _quarto.yml
    pages: set[str],  # The notebooks that exist, by the names of the site
    missing: list[str],  # Filled with the notebooks that are listed and don't exist
) -> object:  # The same part with the names of the site, and without what is missing
    "Rename the notebooks that a navbar or sidebar lists."
    if isinstance(entry, list):
        kept = [rename_entries(item, pages, missing) for item in entry]
        return [
            item
            for item in kept
            if item not in (None, {}) and not (isinstance(item, dict) and item.get("contents") == [])
        ]
    if isinstance(entry, dict):
        new = {key: rename_entries(value, pages, missing) for key, value in entry.items()}
        return None if "href" in new and new["href"] is None else new
    if isinstance(entry, str) and entry.endswith(".ipynb"):
        if site_name(entry) in pages:
            return site_name(entry)
        missing.append(entry)
        return None
    return entry


def stage_site(
    processed: Path,  # Where nbdev left the notebooks
    stage: Path,  # An empty folder
) -> list[str]:  # One line for each problem
    "Lay out a project that smalldocs can render."
    problems, taken, anchors = [], {}, documented(processed)
    for source in sorted(p for p in processed.rglob("*") if p.is_file()):
        relative = source.relative_to(processed).as_posix()
        if source.suffix != ".ipynb":
            if source.name != "nbdev.yml" and source.suffix != ".py":
                (stage / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, stage / relative)
            continue
        name = site_name(relative)
        if name in taken:
            problems.append(f"nbs/{relative}: its page {name} is also the page of nbs/{taken[name]}; rename one")
        taken[name] = relative
        stage_page(source, stage / name, anchors)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    config.pop("metadata-files", None)
    config["format"].pop("commonmark", None)  # Quarto's Markdown copy of each page; smalldocs writes HTML only
    missing: list[str] = []
    config["website"] = rename_entries(config["website"], set(taken), missing)
    problems += [f"_quarto.yml lists {name}, which is not in nbs/" for name in dict.fromkeys(missing)]
    (stage / "_quarto.yml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return problems


# ---------------------------------------------------------------- check what came out


class _Page(HTMLParser):
    "The ids and the links of one page."

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src") and value is not None:
                self.links.append(value)


def _target(page: Path, link: str) -> tuple[Path, str] | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link in ("", "#"):
        return None
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)


def check_links(
    site: Path,  # A built site
) -> list[str]:  # One line for each broken link, dead anchor and unreachable page
    "Follow every link inside the site, starting at index.html."
    site = site.resolve()
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    problems, edges = [], {}
    for path, page in pages.items():
        where, edges[path] = path.relative_to(site), set()
        for link in dict.fromkeys(page.links):
            found = _target(path, link)
            if found is None:
                continue
            target, anchor = found
            edges[path].add(target)
            if not target.is_relative_to(site) or not target.is_file():
                problems.append(f"{where}: broken link {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                problems.append(f"{where}: link {link}: the page has no such anchor")
    seen, todo = set(), [site / "index.html"]
    while todo:
        if (path := todo.pop()) in pages and path not in seen:
            seen.add(path)
            todo += edges[path]
    return problems + [f"{path.relative_to(site)}: no page links to it" for path in pages if path not in seen]


def build(
    out: Path,  # Where the site goes; replaced when the build succeeds
    force: bool = False,  # Process every notebook again
) -> tuple[int, list[str]]:  # Number of pages; one line for each problem
    "Build the whole site."
    from smalldocs.config import load
    from smalldocs.site import Site

    processed = process_notebooks(force)
    with tempfile.TemporaryDirectory(prefix="site-") as folder:
        stage = Path(folder) / "stage"
        stage.mkdir()
        problems = stage_site(processed, stage)
        site = Site(load(stage), quiet=True)
        site.out = Path(folder) / "site"
        count = site.build()
        problems += [w for w in site.warnings if "broken link" not in w]
        problems += check_links(site.out)
        if out.exists():
            if any(out.iterdir()) and not (out / "site_libs").is_dir():
                raise SystemExit(f"{out} is not empty and is not a site: give another folder with --out")
            shutil.rmtree(out)
        shutil.move(site.out, out)
    return count, problems


def main() -> int:
    "Read the command line, build, report."
    parser = argparse.ArgumentParser(description="Build the site without Quarto.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="where the site goes (default _docs)")
    parser.add_argument("--force", action="store_true", help="process every notebook again")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        count, problems = build(args.out.resolve(), args.force)
    except ImportError as error:
        print(f"Missing package {error.name}: install the extras `docs` and `dev` (`make docs` does)", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"The site was not built: {type(error).__name__}: {error}", file=sys.stderr)
        if "show_doc" in str(error) and "NameError" in str(error):
            print("The signature names something that a later cell defines: define it first.", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{count} pages in {time.perf_counter() - start:.1f} s: {args.out / 'index.html'}")
    if problems:
        print(f"{len(problems)} problems, listed above", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
