"""Rules of the repository: settings, imports, files, workflows, the README."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
import readme
import yaml

from deepseek_cookbook.settings import PROFILES, load_settings

PACKAGE = "deepseek_cookbook"


@pytest.fixture(scope="module")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


# ---------------------------------------------------------------- settings and imports


@pytest.mark.parametrize("profile", PROFILES)
def test_every_settings_key_is_valid(profile, root):
    settings = load_settings(profile, path=root / "settings.ini")
    assert settings.profile == profile
    sections = re.findall(r"(?m)^\[(\w+)\]", (root / "settings.ini").read_text())
    assert sections and all(isinstance(settings[section], dict) for section in sections)


def test_every_subsection_names_a_profile(root):
    names = re.findall(r"(?m)^\[\w+\.(\w+)\]", (root / "settings.ini").read_text())
    assert set(names) <= set(PROFILES)


def imported(path) -> set[str]:
    "The top-level packages that a file imports."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared(root, pyproject):
    project = pyproject["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    declared = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}
    owners = importlib.metadata.packages_distributions()
    missing = {}
    for path in (root / PACKAGE).rglob("*.py"):
        for name in imported(path) - set(sys.stdlib_module_names) - {PACKAGE}:
            if not {normal(owner) for owner in owners.get(name, [name])} & declared:
                missing.setdefault(name, []).append(path.relative_to(root).as_posix())
    assert not missing, f"add to the dependencies in pyproject.toml: {missing}"


@pytest.mark.parametrize("module, budget", [(PACKAGE, 0.3), (f"{PACKAGE}.settings", 1.0)])
def test_import_is_fast_and_leaves_torch_alone(module, budget):
    code = f"import time, sys; t = time.perf_counter(); import {module}; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t, 'torch' in sys.modules)"]
    answers = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert all(answer.split()[1] == "False" for answer in answers)
    assert min(float(answer.split()[0]) for answer in answers) < budget


def test_public_names_have_a_module_each(root):
    import deepseek_cookbook

    for name, module in deepseek_cookbook._PUBLIC.items():
        path = (root / PACKAGE / module.replace(".", "/")).with_suffix(".py")
        assert path.is_file(), f"{name}: {path.name} does not exist"
        assert re.search(rf"(?m)^(def|class|async def) {name}\b|^{name}\b.*=", path.read_text()), (
            f"{name} is not in {path.name}"
        )
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        deepseek_cookbook.nonsense  # noqa: B018


# ---------------------------------------------------------------- files


def test_no_folder_of_a_machine(tracked, root):
    pattern = re.compile(  # "me" is nobody: examples of what must not be published
        r"(?<![\w.:/-])/(?:home/(?!me\b)[a-z]|root/|Users/(?!me\b)[A-Za-z]|work/)|[A-Z]:\\+Users\\+(?!me\b)"
    )
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(root)}: {m[0]}" for m in pattern.finditer(text)]
    assert found == []


def test_no_large_file(tracked):
    assert [f"{p.name}: {p.stat().st_size:,}" for p in tracked if p.stat().st_size > 400_000] == []


def test_licence(root, pyproject):
    text = (root / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert pyproject["project"]["license"] == "Apache-2.0"


def test_changelog_has_the_version(root):
    import deepseek_cookbook

    assert f"## {deepseek_cookbook.__version__}" in (root / "CHANGELOG.md").read_text()


def test_text_files_parse(tracked):
    for path in tracked:
        if path.suffix in (".yml", ".yaml"):
            yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))


def test_links_between_text_files_hold(root):
    broken = []
    for path in [*root.glob("*.md"), *(root / "dev").glob("*.md")]:
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists():
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_readme_is_what_the_index_gives(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 0, capsys.readouterr().err


def test_readme_writer():
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "[a](01_x.ipynb) [b](../LICENSE) [c](https://x.y) [d](#e)"]},
        {"cell_type": "code", "source": "#| hide\nx = 1", "outputs": []},
        {
            "cell_type": "code",
            "source": "#| echo: false\nx",
            "outputs": [{"data": {"text/markdown": "| [t](02_y.ipynb) |"}}],
        },
        {"cell_type": "code", "source": "1 + 1", "outputs": [{"data": {"text/plain": ["2"]}}]},
    ]
    text = readme.to_markdown({"cells": cells}).removeprefix(readme.HEAD)
    assert text == (
        "# T\n[a](nbs/01_x.ipynb) [b](LICENSE) [c](https://x.y) [d](#e)\n\n| [t](nbs/02_y.ipynb) |\n\n"
        "```python\n1 + 1\n```\n\n```\n2\n```\n"
    )


def test_commands_in_the_texts_exist(root):
    targets = set(re.findall(r"(?m)^([a-z]+):", (root / "Makefile").read_text()))
    for name in ("README.md", "CONTRIBUTING.md", "Makefile"):
        text = (root / name).read_text(encoding="utf-8")
        asked = set(re.findall(r"(?:^|`|\s{2})make ([a-z]+)", text, re.MULTILINE))
        assert asked <= targets, f"{name}: make {asked - targets}"
        for script in re.findall(r"scripts/[\w/]+\.py", text):
            assert (root / script).is_file(), f"{name}: {script}"


# ---------------------------------------------------------------- workflows


def workflows(root):
    return {p.name: yaml.safe_load(p.read_text()) for p in (root / ".github" / "workflows").glob("*.yml")}


def test_workflows_pin_actions_and_permissions(root):
    found = workflows(root)
    assert found.keys() == {"ci.yml", "docs.yml"}
    for name, flow in found.items():
        assert flow["permissions"] == {"contents": "read"}, name
        assert True in flow, f"{name} has no `on:`"  # YAML 1.1 reads `on` as true
        for job in flow["jobs"].values():
            for step in job["steps"]:
                if "uses" in step:
                    assert re.search(r"@(v?\d|[0-9a-f]{40})", step["uses"]), f"{name}: {step['uses']}"


def test_ci_runs_the_tests_on_both_pythons(root):
    job = workflows(root)["ci.yml"]["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert any("make test" in step.get("run", "") for step in job["steps"])


def test_docs_workflow_pins_quarto(root):
    steps = [step for job in workflows(root)["docs.yml"]["jobs"].values() for step in job["steps"]]
    quarto = next(step for step in steps if "quarto-actions/setup" in step.get("uses", ""))
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(quarto["with"]["version"]))


@pytest.mark.parametrize("link, target", [
    ("deepseek_cookbook/settings.ini", "settings.ini"), ("nbs/_quarto.yml", "_quarto.yml"),
])  # fmt: skip
def test_what_two_places_read_is_one_file(root, link, target):
    "A copy would drift from its original as soon as one of them is edited."
    assert (root / link).is_symlink() and (root / link).resolve() == root / target


def test_every_notebook_is_in_the_sidebar(root):
    sidebar = (root / "_quarto.yml").read_text(encoding="utf-8")
    assert [p.name for p in sorted((root / "nbs").glob("*.ipynb")) if p.name not in sidebar] == []
