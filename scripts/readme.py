"""Write README.md from nbs/index.ipynb, without Quarto.

    python scripts/readme.py [--check]

Markdown cells are copied; code cells become fenced code with their outputs; hidden cells are left out. With `--check`
nothing is written: exit code 1 says that README.md is not what the notebook gives.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from check_notebooks import ROOT, directives, text_of

INDEX = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
HEAD = "<!-- Written by scripts/readme.py from nbs/index.ipynb: edit the notebook, not this file. -->\n\n"


def from_root(
    markdown: str,  # Markdown whose links are relative to nbs/
) -> str:  # The same with links relative to the root of the repository
    "Rewrite relative links."

    def rewrite(found):
        target = found[2]
        if re.match(r"[a-z]+:|#|/", target):
            return found[0]
        return found[1] + os.path.normpath(f"nbs/{target}").replace(os.sep, "/") + found[3]

    return re.sub(r"(\]\()([^)\s]+)(\))", rewrite, markdown)


def fence(text: str, language: str = "") -> str:
    "A fenced block that the text cannot close."
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def output_markdown(
    output: dict,  # One output of a cell
) -> str:  # Markdown for it, "" for what a README cannot show
    "Show Markdown as it is and text in a fence; pictures and HTML are left to the site."
    data = output.get("data", {})
    if "text/markdown" in data:
        return from_root(text_of(data["text/markdown"]))
    text = text_of(output.get("text") or data.get("text/plain") or "")
    return fence(text) if text.strip() else ""


def to_markdown(
    notebook: dict,  # The index as JSON
) -> str:  # The README
    "Turn the cells into Markdown, in order."
    parts = []
    for cell in notebook["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(from_root(source))
            continue
        found = directives(source)
        if cell["cell_type"] != "code" or "hide" in found or found.get("include") == "false":
            continue
        code = "\n".join(line for line in source.split("\n") if not re.match(r"\s*#\s*\|", line)).strip()
        if code and found.get("echo") != "false":
            parts.append(fence(code, "python"))
        if found.get("output") != "false":
            parts += [output_markdown(output) for output in cell.get("outputs", [])]
    return HEAD + "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def main() -> int:
    "Write or check."
    parser = argparse.ArgumentParser(description="Write README.md from nbs/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is stale")
    args = parser.parse_args()
    if not INDEX.exists():
        print(f"{INDEX.relative_to(ROOT)} does not exist: README.md is written from it", file=sys.stderr)
        return 1
    text = to_markdown(json.loads(INDEX.read_text(encoding="utf-8")))
    if args.check:
        if README.exists() and README.read_text(encoding="utf-8") == text:
            return 0
        print("README.md is not what nbs/index.ipynb gives: run python scripts/readme.py", file=sys.stderr)
        return 1
    temporary = Path(f"{README}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, README)
    print(f"README.md: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
