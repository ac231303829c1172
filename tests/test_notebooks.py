"""The rules of the notebooks hold, the rules themselves find what they should, and every notebook runs."""

import json
import os
import shutil

import check_notebooks as check
import nbformat
import pytest
import save_notebooks as save
from forked_notebooks import run_notebooks

NOTEBOOKS = check.find_notebooks()
IDS = [path.stem for path in NOTEBOOKS]
OWN = {"_quarto.yml", "styles.css", "tutorials"}  # what nbs/ holds beside notebooks; a run must add nothing to it
GENERATED = {"nbdev.yml", "sidebar.yml", "__pycache__", ".ipynb_checkpoints"}  # by nbdev, Python and Jupyter
SECONDS = 60  # budget of a notebook in the tiny profile on two cores

TITLE = "# A title\n> A subtitle.\n\n> 中文摘要：一。二。三。"
WORDS = "Some words of prose that say why, at a length that keeps the balance. " * 4


def write(path, *cells, **metadata):
    "Write a notebook: text starting with `#|` or given as (source, outputs) is code, the rest is markdown."
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    nb.metadata.update(metadata)
    for cell in cells:
        if isinstance(cell, tuple):
            nb.cells.append(nbformat.v4.new_code_cell(cell[0], outputs=cell[1]))
        elif cell.startswith("#|"):
            nb.cells.append(nbformat.v4.new_code_cell(cell))
        else:
            nb.cells.append(nbformat.v4.new_markdown_cell(cell))
    nbformat.write(nb, path)
    return path


def found(path) -> str:
    "What the checker says, but for the missing record of a saved run."
    return "\n".join(map(str, check.check_notebook(path, tuple(c for c in check.CHECKS if c is not check.check_fresh))))


@pytest.fixture
def good(tmp_path):
    "A notebook without a fault."
    return [
        TITLE,
        "#| default_exp data.good",
        "#| export\nimport re",
        WORDS,
        '#| export\ndef f():\n    "One."\n    return 1',
    ]


def expect_none(violations) -> None:
    "Fail with one line for each violation."
    if lines := [str(violation) for violation in violations if violation.hard]:
        pytest.fail("\n".join(lines), pytrace=False)


def stream(text, name="stdout"):
    return [nbformat.v4.new_output("stream", name=name, text=text)]


def display(**data):
    return [nbformat.v4.new_output("display_data", data={k.replace("__", "/"): v for k, v in data.items()})]


# ---------------------------------------------------------------- the notebooks of the project


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_budgets_and_anatomy(path):
    rules = tuple(c for c in check.CHECKS if c is not check.check_fresh)
    expect_none(check.check_notebook(path, rules))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_outputs_are_fresh(path):
    expect_none(check.check_notebook(path, (check.check_fresh,)))
    assert json.loads(path.read_text())["metadata"]["cookbook"]["profile"] == "laptop"


def test_no_two_notebooks_share_a_number():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS if path.name[0].isdigit()]
    assert sorted(set(numbers)) == sorted(numbers)


def test_modules_equal_notebooks():
    expect_none(check.check_exports())


# ---------------------------------------------------------------- the checker, on notebooks that are wrong


def test_a_good_notebook_passes(good, tmp_path):
    assert found(write(tmp_path / "01_data.good.ipynb", *good)) == ""


@pytest.mark.parametrize(
    "place, cell, message",
    [
        (0, "No title here.", "no H1 title"),
        (0, "# A title\n\ntext", "no subtitle"),
        (0, "# A title\n> Sub.\n\ntext", "no Chinese summary"),
        (0, "# A title\n> Sub.\n\n> 中文摘要：一。", "has 1 sentences (budget: 3 to 5)"),
        (0, f"{TITLE}\n\n- key: value", "list with a colon"),
        (1, "#| default_exp other", "default_exp is other (budget: data.good)"),
        (2, "#| export\nimport re\nx = 1", "cell 2: imports mixed with other code"),
        (2, "#| export\nfrom torch import *", "from torch import *"),
        (2, "#| hide\nimport nbdev; nbdev.nbdev_export()", "exports itself"),
        (2, "#| export\nx = = 1", "not Python"),
        (3, f"{WORDS}\n\n# Again", "second H1"),
        (3, f"{WORDS}\n::: {{.panel}}\n:::", "a Quarto div"),
        (3, f"{WORDS} See @fig-loss.", "a Quarto cross-reference"),
        (3, f"{WORDS} <details>x</details>", "raw HTML"),
        (3, f"{WORDS}\n\n```mermaid\ngraph\n```", "mermaid"),
        (3, f"{WORDS} [x](settings.html)", "link to a page of the site"),
        (3, f"{WORDS} [x](99_nowhere.ipynb)", "a link to 99_nowhere.ipynb"),
        (3, f"{WORDS} in /ho" + "me/me/x", "a folder of a machine"),
        (4, "#| export\n" + "x = 1\n" * 49, "words of prose for 50 lines of code"),
        (
            4,
            '#| export\ndef f():\n    "One."\n' + "    x = 1\n" * 70,
            "exported cell has 72 lines (budget: 25, never over 50)",
        ),
        (
            4,
            '#| export\ndef f():\n    "One."\n' + "    x = 1\n" * 70,
            "function f has 72 lines (budget: 30, never over 60)",
        ),
        (4, "#| export\n" + "x = 1\n" * 401, "module has 402 lines (budget: 250, never over 400)"),
        (4, "#| export\nx = '" + "y" * 130 + "'", "line 2 has 136 characters (budget: 120)"),
        (4, "#| export\ndef f(): return 1", "f has no docstring"),
        (4, ("1/0", [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])]), "a stored error, E"),
        (4, ("f()", display(image__png="A" * 150_001)), "a picture of 150,001 bytes (budget: 150,000)"),
        (4, ("f()", display(text__plain="<Figure size 450x360 with 1 Axes>")), "a figure that was not drawn"),
        (4, ("f()", stream("x" * 300_000)), "outputs take"),
        (4, ("f()", display(**{"application__vnd.jupyter.widget-view+json": {}})), "a widget"),
        (4, ("f()", stream("saved to /ro" + "ot/x")), "shows a folder of this machine"),
    ],
)
def test_the_checker_names_the_fault(good, tmp_path, place, cell, message):
    good[place] = cell
    assert message in found(write(tmp_path / "01_data.good.ipynb", *good))


def test_the_checker_sees_kernel_counters_and_names(good, tmp_path):
    kernel = {"display_name": "R", "language": "R", "name": "ir"}
    assert "kernelspec 'ir'" in found(write(tmp_path / "01_data.good.ipynb", *good, kernelspec=kernel))
    path = write(tmp_path / "01_data.good.ipynb", *good)
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 3', 1))
    assert "run nbdev-clean" in found(path)
    assert "an export in a notebook without a number" in found(write(tmp_path / "quickstart.ipynb", *good))
    (tmp_path / "02_broken.ipynb").write_text("{")
    assert "not a notebook" in found(tmp_path / "02_broken.ipynb")


def test_a_changed_cell_makes_the_outputs_stale(good, tmp_path):
    path = write(tmp_path / "01_data.good.ipynb", *good)
    fresh = lambda: [str(v) for v in check.check_notebook(path, (check.check_fresh,))]  # noqa: E731
    assert "no record of a saved run" in fresh()[0]
    save.store(path, save.Run(nbformat.read(path, 4), 1.0), "laptop")
    assert fresh() == [] and found(path) == ""
    path.write_text(path.read_text().replace("return 1", "return 2"))
    assert "the code changed after the outputs were saved" in fresh()[0]


def test_an_edited_module_is_found(tmp_path):
    for name in ("nbs", check.PACKAGE):
        shutil.copytree(check.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(check.ROOT / "pyproject.toml", tmp_path)
    module = tmp_path / check.PACKAGE / "settings.py"
    module.write_text(module.read_text() + "\nx = 1\n")
    (tmp_path / check.PACKAGE / "extra.py").write_text("x = 1\n")
    assert [v.file for v in check.check_exports(tmp_path)] == [
        f"{check.PACKAGE}/extra.py",
        f"{check.PACKAGE}/settings.py",
    ]


# ---------------------------------------------------------------- saving


def test_save_keeps_results_and_drops_noise(tmp_path):
    noise = "import sys\nprint('a\\rb\\rlast')\nprint('warning', file=sys.stderr)\n1 + 1"
    path = write(tmp_path / "x.ipynb", TITLE, (noise, []), ("#| eval: false\n1/0", stream("kept")))
    run = save.execute(path, "tiny", timeout=60)
    assert run.error == "" and run.peak_bytes > 10**7
    save.store(path, run, "tiny")
    nb = json.loads(path.read_text())
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    texts = ["".join(o.get("text") or o["data"]["text/plain"]) for o in outputs]
    assert texts == ["last\n", "2", "kept"]
    assert nb["metadata"]["cookbook"].keys() == set(check.SAVED_KEYS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.ipynb"]


def test_a_failing_notebook_stays_as_it_was(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "x.ipynb", TITLE, ("1/0", stream("old")))
    before = path.read_bytes()
    monkeypatch.setattr(save, "ROOT", tmp_path)
    assert save.save(path, "tiny") is False
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- every notebook runs, without network


@pytest.fixture(scope="session")
def runs(root):
    "All notebooks executed in the tiny profile, two at a time unless this is one of two workers; and what they left."
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    results = dict(zip(IDS, run_notebooks(NOTEBOOKS, "tiny", workers), strict=True))
    found = [p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*") if p.suffix != ".ipynb"]
    return results, sorted(str(p) for p in found if p.name not in OWN and not GENERATED & set(p.parts))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", IDS)
def test_notebook_runs_in_tiny(runs, name):
    _, seconds, cpu_seconds, error = runs[0][name]
    assert error == ""
    # On a busy machine the wall clock lies: CPU seconds count then.
    assert min(seconds, cpu_seconds) <= SECONDS


@pytest.mark.timeout(900)
def test_notebooks_leave_nothing_behind(runs):
    assert runs[1] == []


@pytest.mark.timeout(900)
def test_table_of_the_index_shows_the_records(runs):
    def tables(nb):
        data = [o.get("data", {}).get("text/markdown", "") for c in nb["cells"] for o in c.get("outputs", [])]
        return ["".join(text) for text in data if text]

    stored = json.loads((check.ROOT / "nbs" / "index.ipynb").read_text())
    assert tables(stored) == tables(runs[0]["index"][0]), "run make save NB=index"


def test_network_is_blocked_but_loopback():
    import socket
    import subprocess
    import sys

    code = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "NetworkBlocked" in run.stderr
    with pytest.raises(ConnectionError, match="blocked"):
        socket.getaddrinfo("example.org", 443)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), 2).close()
