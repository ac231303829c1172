"""Hold the notebooks to the budgets, the anatomy and the plain markdown that the project agreed on.

    python scripts/check_notebooks.py [names] [--strict]

One line per violation: file, cell, what was found, the budget, what to do. A line that starts with `note` is over a
soft budget and does not fail, unless `--strict`. Nothing is written but to a temporary folder.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "deepseek_cookbook"

CELL_LINES = (25, 50)  # exported cell: soft, hard
FUNCTION_LINES = (30, 60)  # function or method: soft, hard
MODULE_LINES = (250, 400)  # all exported lines of a notebook: soft, hard
LINE_LENGTH = 120
WORDS_PER_LINE = 2.0  # prose to code, whole notebook
OUTPUT_BYTES = 300_000  # all outputs of a notebook
IMAGE_BYTES = 150_000  # one picture, as base64
SUMMARY_SENTENCES = (3, 5)  # the Chinese summary
SAVED_KEYS = ("code_hash", "profile", "seconds", "versions", "hardware", "peak_memory_gib")

_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$")
_MACHINE_PATH = re.compile(r"/(?:home|root|Users|work|tmp)/|[A-Z]:\\+Users\\")
_NOT_PORTABLE = {
    r"^\s*:::": "a Quarto div",
    r"\{\{<": "a Quarto shortcode",
    r"(?<![\w`])@(fig|tbl|sec|eq|lst)-": "a Quarto cross-reference",
    r"\]\([^)]*\)\{|^#.*\{[.#][^}]*\}\s*$": "a Quarto attribute",
    r"</?(div|span|details|summary|img|table|style|script|iframe|center|font)\b": "raw HTML",
    r"\[\^\w+\]": "a footnote",
    r"\]\((?!https?:)[^)\s]+\.html": "a link to a page of the site (link to the .ipynb)",
}


@dataclass(frozen=True)
class Violation:
    "One broken rule, at one place."

    file: str
    cell: int | None  # counted from 0; None: the whole file
    found: str
    budget: str
    advice: str
    hard: bool = True

    def __str__(self) -> str:
        where = self.file if self.cell is None else f"{self.file} cell {self.cell}"
        return f"{'' if self.hard else 'note: '}{where}: {self.found} (budget: {self.budget}): {self.advice}"


class Notebook:
    "A notebook as the checks want it."

    def __init__(self, path: Path):
        self.path = path
        self.file = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.metadata = self.raw.get("metadata", {})
        self.cells = [{**cell, "source": text_of(cell.get("source", ""))} for cell in self.raw["cells"]]
        self.code = [(i, c) for i, c in enumerate(self.cells) if c["cell_type"] == "code"]
        self.markdown = [(i, c) for i, c in enumerate(self.cells) if c["cell_type"] == "markdown"]
        self.exported = [
            (i, c) for i, c in self.code if directives(c["source"]).keys() & {"export", "exports", "exporti"}
        ]
        name = re.fullmatch(r"\d\d[a-z]?_(.+)", path.stem)
        self.module = name[1] if name and path.parent.name != "tutorials" else None

    def broken(self, cell, found, budget, advice, hard=True) -> Violation:
        "A violation in this notebook."
        return Violation(self.file, cell, found, str(budget), advice, hard)


def text_of(value: str | list) -> str:
    "The text of a field that may be a list of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> dict[str, str]:
    "The `#| name: value` lines of a cell."
    return {found[1]: found[2].strip() for line in source.split("\n") if (found := _DIRECTIVE.match(line))}


def code_lines(source: str) -> list[str]:
    "The lines of a cell that are code: not blank, not a directive."
    return [line for line in source.split("\n") if line.strip() and not _DIRECTIVE.match(line)]


def parse(source: str) -> ast.Module | None:
    "The syntax tree of a cell without its magics, or None."
    plain = "\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in source.split("\n"))
    try:
        return ast.parse(plain)
    except SyntaxError:
        return None


def prose(source: str) -> str:
    "Markdown without its code: fences and inline code."
    return re.sub(r"`[^`\n]+`", "code", re.sub(r"(?ms)^ {0,3}(```|~~~).*?^ {0,3}\1\s*$", "", source))


def words(text: str) -> float:
    "Words of prose; two Chinese characters count as one word."
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    return len(re.findall(r"[^\W_]+", re.sub(r"[\u4e00-\u9fff]", " ", text))) + chinese / 2


def code_hash(
    notebook: dict,  # A notebook as JSON
) -> str:  # SHA-256 of its code cells
    "What the outputs were computed from: equal hashes mean that the outputs are those of this code."
    sources = [text_of(c["source"]).strip() for c in notebook["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256("\n\x00\n".join(sources).encode()).hexdigest()


# ---------------------------------------------------------------- budgets


def check_sizes(nb: Notebook) -> Iterator[Violation]:
    "Exported cells, functions, the module, line length."
    for i, cell in nb.exported:
        yield from over(nb, i, "exported cell", len(code_lines(cell["source"])), CELL_LINES, "split it at an idea")
    total = sum(len(code_lines(cell["source"])) for _, cell in nb.exported)
    yield from over(nb, None, "module", total, MODULE_LINES, "split the notebook along a seam that a reader can name")
    for i, cell in nb.code:
        for node in ast.walk(parse(cell["source"]) or ast.Module([], [])):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno + 1
                yield from over(
                    nb, i, f"function {node.name}", size, FUNCTION_LINES, "take a step out of it, under a name"
                )
        for n, line in enumerate(cell["source"].split("\n"), 1):
            if len(line) > LINE_LENGTH:
                yield nb.broken(i, f"line {n} has {len(line)} characters", LINE_LENGTH, "break the line")


def over(nb: Notebook, cell, what: str, lines: int, budget: tuple[int, int], advice: str) -> Iterator[Violation]:
    "A soft or a hard violation when `lines` is over its budget."
    soft, hard = budget
    if lines > soft:
        yield nb.broken(cell, f"{what} has {lines} lines", f"{soft}, never over {hard}", advice, hard=lines > hard)


def check_prose(nb: Notebook) -> Iterator[Violation]:
    "Enough words for the code."
    lines = sum(len(code_lines(cell["source"])) for _, cell in nb.code)
    count = sum(words(prose(cell["source"])) for _, cell in nb.markdown)
    if lines and count / lines < WORDS_PER_LINE:
        found = f"{count:.0f} words of prose for {lines} lines of code, {count / lines:.1f} a line"
        yield nb.broken(None, found, f"{WORDS_PER_LINE:.0f} a line", "say why, or move machine-only code to tests/")


def check_outputs(nb: Notebook) -> Iterator[Violation]:
    "Size of the outputs, no widgets, no errors, nobody's folders."
    size = sum(len(json.dumps(cell.get("outputs", []), ensure_ascii=False).encode()) for _, cell in nb.code)
    if size > OUTPUT_BYTES:
        yield nb.broken(None, f"outputs take {size:,} bytes", f"{OUTPUT_BYTES:,}", "show less, or a smaller picture")
    if "widgets" in nb.metadata:
        yield nb.broken(None, "widget state in the metadata", "none", "save with scripts/save_notebooks.py")
    for i, cell in nb.code:
        for output in cell.get("outputs", []):
            yield from check_output(nb, i, output)


def check_output(nb: Notebook, i: int, output: dict) -> Iterator[Violation]:
    "One output of one cell."
    if output["output_type"] == "error":
        yield nb.broken(
            i, f"a stored error, {output.get('ename')}", "none", "use fastcore.test.expect_fail, or mend it"
        )
    data = output.get("data", {})
    if text_of(data.get("text/plain", "")).startswith("<Figure size") and "image/png" not in data:
        yield nb.broken(i, "a figure that was not drawn", "a picture", "show Image(to_png(figure))")
    for mime, value in data.items():
        value = text_of(value) if isinstance(value, (str, list)) else json.dumps(value)
        if "widget" in mime:
            yield nb.broken(i, f"a widget ({mime})", "none", "save with scripts/save_notebooks.py, which drops them")
        if mime.startswith("image/") and len(value) > IMAGE_BYTES:
            yield nb.broken(i, f"a picture of {len(value):,} bytes", f"{IMAGE_BYTES:,}", "lower its dpi or its size")
    text = json.dumps([v for m, v in output.get("data", {}).items() if m.startswith("text")] + [output.get("text", "")])
    if found := _MACHINE_PATH.search(text):
        yield nb.broken(
            i, f"an output shows a folder of this machine ({found[0]}…)", "none", "show .name, or a relative path"
        )


# ---------------------------------------------------------------- anatomy


def check_opening(nb: Notebook) -> Iterator[Violation]:
    "Title, subtitle, Chinese summary."
    first = nb.cells[0] if nb.cells else {"cell_type": "", "source": ""}
    lines = [line for line in first["source"].split("\n") if line.strip()]
    if first["cell_type"] != "markdown" or not lines or not lines[0].startswith("# "):
        yield nb.broken(0, "the first cell has no H1 title", "# Title", "start with a markdown cell `# Title`")
        return
    if len(lines) < 2 or not lines[1].startswith("> ") or "中文摘要" in lines[1]:
        yield nb.broken(
            0, "no subtitle under the title", "> one sentence", "say in one sentence what the chapter gives"
        )
    if any(re.match(r"- \S.*:", line) for line in lines):
        yield nb.broken(
            0, "a list with a colon in the title cell", "none", "move it to the next cell: nbdev reads it as metadata"
        )
    opening = "\n".join(c["source"] for c in nb.cells[:4] if c["cell_type"] == "markdown")
    summary = re.search(r"(?m)^> \*{0,2}中文摘要\*{0,2}\s*[：:](.*(?:\n>.*)*)", opening)
    least, most = SUMMARY_SENTENCES
    if not summary:
        yield nb.broken(
            0, "no Chinese summary", f"{least} to {most} sentences", "add `> 中文摘要：…` under the subtitle"
        )
    elif not least <= (n := len(re.findall(r"[。！？]", summary[1]))) <= most:
        yield nb.broken(0, f"the Chinese summary has {n} sentences", f"{least} to {most}", "shorten or extend it")
    for i, cell in nb.markdown[1:]:
        if re.search(r"(?m)^# ", prose(cell["source"])):
            yield nb.broken(i, "a second H1", "1", "use `## `")


def check_module(nb: Notebook) -> Iterator[Violation]:
    "The name of the module, and what surrounds the exports."
    named = [(i, value) for i, c in nb.code if (value := directives(c["source"]).get("default_exp"))]
    if nb.module is None:
        for i, _ in nb.exported:
            yield nb.broken(i, "an export in a notebook without a number", "none", "index and tutorials export nothing")
    elif [value for _, value in named] != [nb.module]:
        found = f"default_exp is {', '.join(v for _, v in named) or 'missing'}"
        yield nb.broken(named[0][0] if named else None, found, nb.module, f"write `#| default_exp {nb.module}` once")
    for i, cell in nb.code:
        if "nbdev_export" in cell["source"]:
            yield nb.broken(i, "the notebook exports itself", "none", "take the cell out: `nbdev-export` is a command")
        tree = parse(cell["source"])
        if tree is None:
            yield nb.broken(i, "the cell is not Python", "Python", "mend it, or show it as fenced text in markdown")
            continue
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        if imports and len(imports) < len(tree.body):
            yield nb.broken(
                i, "imports mixed with other code", "imports alone", "move the imports to a cell of their own"
            )
        for node in imports:
            star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
            if star and (i, cell) in nb.exported and not (node.module or "").startswith(PACKAGE):
                yield nb.broken(i, f"from {node.module} import *", "named imports", "import the names in use")


def check_format(nb: Notebook) -> Iterator[Violation]:
    "Valid, clean, and for the standard kernel."
    import nbformat
    from nbdev.clean import clean_nb

    kernel = nb.metadata.get("kernelspec", {})
    if (kernel.get("name"), kernel.get("language")) != ("python3", "python"):
        yield nb.broken(None, f"kernelspec {kernel.get('name')!r}", "python3", "pick the kernel Python 3 (ipykernel)")
    try:
        nbformat.validate(nb.raw)
    except nbformat.ValidationError as error:
        yield nb.broken(None, f"not a valid notebook: {str(error).splitlines()[0]}", "nbformat 4.5", "run nbdev-clean")
        return
    clean = json.loads(json.dumps(nb.raw))
    clean_nb(clean, allowed_metadata_keys=["cookbook"])
    clean["metadata"].get("kernelspec", {})["display_name"] = kernel.get("display_name")
    if clean != nb.raw:
        yield nb.broken(
            None, "counters or metadata that change at each run", "none", f"run nbdev-clean --fname {nb.file}"
        )


def check_markdown(nb: Notebook) -> Iterator[Violation]:
    "Markdown that Colab, JupyterLab, GitHub and the site all show; links to notebooks that exist."
    for i, cell in nb.markdown:
        text = prose(cell["source"])
        for pattern, name in _NOT_PORTABLE.items():
            if re.search(pattern, text, re.MULTILINE):
                yield nb.broken(i, name, "portable markdown", "use headings, lists, pipe tables, block quotes, $math$")
        if re.search(r"(?m)^ {0,3}(```|~~~)\s*\{?mermaid", cell["source"]):
            yield nb.broken(i, "a mermaid diagram", "portable markdown", "use a table, or a picture from a code cell")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target = link.split("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (nb.path.parent / target).exists():
                yield nb.broken(i, f"a link to {target}", "a file that exists", "mend the link")
        if found := _MACHINE_PATH.search(cell["source"]):
            yield nb.broken(i, f"a folder of a machine ({found[0]}…)", "none", "write a relative path")


def check_docstrings(nb: Notebook) -> Iterator[Violation]:
    "Every exported public name says what it is."
    for i, cell in nb.exported:
        for node in (parse(cell["source"]) or ast.Module([], [])).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                yield nb.broken(i, f"{node.name} has no docstring", "one line", "say what it does", hard=False)


def check_fresh(nb: Notebook) -> Iterator[Violation]:
    "The stored outputs are those of the code as it stands."
    saved = nb.metadata.get("cookbook", {})
    advice = f"run make save NB={nb.path.stem}"
    if missing := [key for key in SAVED_KEYS if key not in saved]:
        yield nb.broken(None, f"no record of a saved run ({', '.join(missing)})", "a saved run", advice)
    elif saved["code_hash"] != code_hash(nb.raw):
        yield nb.broken(None, "the code changed after the outputs were saved", "fresh outputs", advice)


CHECKS = (
    check_format, check_opening, check_module, check_sizes, check_prose, check_markdown, check_outputs,
    check_docstrings, check_fresh,
)  # fmt: skip


def check_notebook(
    path: Path,  # A notebook
    checks: tuple = CHECKS,  # Which rules
) -> list[Violation]:  # What is wrong with it
    "Run the checks on one notebook."
    try:
        nb = Notebook(Path(path))
    except (ValueError, KeyError) as error:
        return [Violation(Path(path).name, None, f"not a notebook: {error}", "JSON", "restore it from git")]
    return [violation for check in checks for violation in check(nb)]


# ---------------------------------------------------------------- exported modules


def export_copy(
    root: Path,  # A project
    folder: Path,  # An empty folder
) -> Path:  # The package as the notebooks export it
    "Export all notebooks of a project into a copy: nothing in the project is touched."
    shutil.copytree(root / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "_*"), symlinks=True)
    shutil.copy(root / "pyproject.toml", folder)
    for init in (root / PACKAGE).rglob("__init__.py"):
        target = folder / init.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, target)
    env = {**os.environ, "IN_TEST": ""}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nbdev-export failed: {run.stderr.strip().splitlines()[-1:]}")
    return folder / PACKAGE


def check_exports(
    root: Path = ROOT,  # A project
) -> list[Violation]:  # One for each module that is not what its notebook exports
    "The package equals the notebooks."
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        fresh = export_copy(root, Path(folder))
        expected = {p.relative_to(fresh): p.read_text(encoding="utf-8") for p in fresh.rglob("*.py")}
    actual = {p.relative_to(root / PACKAGE): p.read_text(encoding="utf-8") for p in (root / PACKAGE).rglob("*.py")}
    found = []
    for name in sorted(expected.keys() | actual.keys()):
        file = f"{PACKAGE}/{name.as_posix()}"
        if name not in actual:
            found.append(Violation(file, None, "missing", "exported", "run nbdev-export"))
        elif name not in expected:
            found.append(
                Violation(file, None, "no notebook exports it", "exported", "delete it, or restore its notebook")
            )
        elif expected[name] != actual[name]:
            found.append(
                Violation(file, None, "differs from its notebook", "equal", "edit the notebook, run nbdev-export")
            )
    return found


def find_notebooks(names: list[str] | None = None) -> list[Path]:
    "All notebooks, or those whose file name contains one of the names."
    nbs = ROOT / "nbs"
    paths = sorted(p for p in nbs.rglob("*.ipynb") if not re.search(r"(^|/)[._]", p.relative_to(nbs).as_posix()))
    if not names:
        return paths
    found = []
    for name in (n.removesuffix(".ipynb").rsplit("/", 1)[-1] for n in names):
        match = [p for p in paths if p.stem == name] or [p for p in paths if name in p.stem]
        if not match:
            raise SystemExit(f"No notebook has {name} in its name. There are: {', '.join(p.stem for p in paths)}")
        found += [p for p in match if p not in found]
    return found


def main() -> int:
    "Check all notebooks and print what is wrong."
    parser = argparse.ArgumentParser(description="Check the notebooks against the project's rules.")
    parser.add_argument("names", nargs="*", help="parts of notebook names (default: all)")
    parser.add_argument("--strict", action="store_true", help="fail on soft budgets too")
    args = parser.parse_args()
    paths = find_notebooks(args.names)
    found = [violation for path in paths for violation in check_notebook(path)]
    if not args.names:
        found += check_exports()
    for violation in found:
        print(violation)
    hard = sum(violation.hard or args.strict for violation in found)
    print(f"{len(paths)} notebooks, {hard} violations, {len(found) - hard} notes")
    return 1 if hard else 0


if __name__ == "__main__":
    sys.exit(main())
