"""Turn the portable block quotes of the notebooks into what the site shows: callouts and the Chinese summary.

nbdev loads `ForSite` by the key `doc_procs` in pyproject.toml, so this folder must be on `PYTHONPATH`:
scripts/build_docs.py and .github/workflows/docs.yml put it there.
"""

import re

from fastcore.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

KINDS = ("note", "warning", "tip", "important", "caution")
_CALLOUT = re.compile(rf"\*\*({'|'.join(KINDS)}):\s*(.+?)\*\*\s*(.*)", re.IGNORECASE | re.DOTALL)
_CHINESE = re.compile(r"\*{0,2}中文摘要\*{0,2}\s*[：:]")
_PRIVATE = re.compile(r"\[(`_[^`]*`)\]\([^)]*#_[^)]*\)")
_SOURCE = re.compile(r"\[source\]\([^)]*\)\{[^}]*\}\s*")
_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})")


def convert_quote(
    text: str,  # What a block quote says, without its `> ` marks
) -> str | None:  # A Quarto div, or None for an ordinary quote
    "A block quote that opens with `**Note: title**` becomes a callout; `中文摘要：` a box in Chinese."
    if found := _CALLOUT.match(text):
        kind, title, body = found.groups()
        quoted = title.strip().rstrip(".").replace("`", "").replace('"', "'")
        return f'::: {{.callout-{kind.lower()} title="{quoted}"}}\n\n{body.strip()}\n\n:::'
    if _CHINESE.match(text):
        return f'::: {{.chinese-summary lang="zh-Hans"}}\n\n{text.strip()}\n\n:::'
    return None


def convert_quotes(
    source: str,  # Markdown
) -> str:  # Markdown for the site
    "Replace each block quote at the margin that `convert_quote` knows; code fences are left alone."
    out, quote, fence = [], [], None

    def flush():
        text = "\n".join(re.sub(r"^> ?", "", line) for line in quote)
        new = convert_quote(text) if quote else None
        out.extend(["", new, ""] if new else quote)
        quote.clear()

    for line in source.split("\n"):
        mark = _FENCE.match(line)
        if not fence and line.startswith(">"):
            quote.append(line)
            continue
        flush()
        if mark and (fence is None or line.strip().startswith(fence)):
            fence = None if fence else mark[1]
        out.append(line)
    flush()
    return "\n".join(out)


def after_title(
    source: str,  # The cell with the H1
) -> str:  # What stands under the title and its subtitle, or ""
    "nbdev keeps only title and subtitle of the first cell: find the rest, which would be lost."
    found = re.match(r"\s*# [^\n]+\n+(?:>[^\n]+(?:\n|$))?", source)
    return source[found.end() :].strip() if found else ""


class ForSite(Processor):
    "Save the text under the title, then turn block quotes into callouts."

    def __init__(self, nb):
        super().__init__(nb)
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "markdown" and cell.source.lstrip().startswith("# "):
                if rest := after_title(cell.source):
                    extra = mk_cell(rest, "markdown")
                    extra.directives_, extra.idx_ = {}, i
                    nb.cells.insert(i + 1, extra)
                return

    def cell(self, cell):
        "Convert one markdown cell; take out the links of nbdev that lead nowhere."
        if cell.cell_type == "markdown" and cell.source:
            cell.source = _PRIVATE.sub(r"\1", convert_quotes(cell.source))
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            if text and not get_config().git_url:  # no [project.urls] Repository: nothing to link the source to
                text = _SOURCE.sub("", text)
            if text:
                output["data"]["text/markdown"] = _PRIVATE.sub(r"\1", text)
