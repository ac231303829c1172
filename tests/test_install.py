"""The installation: messages for an old Python, no index and a broken environment; nothing half-done counts as done."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "install.py"


def load():
    import importlib.util

    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_can_read_it_and_says_what_is_needed(monkeypatch):
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    install = load()
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"Python 3\.11 or newer is needed, .* is 3\.9\.2"):
        install.check_python()


def project(folder: Path) -> Path:
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "install.py").write_text(SCRIPT.read_text())
    (folder / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return folder / "scripts" / "install.py"


def test_without_an_index_it_says_where_to_point_pip(tmp_path):
    script = project(tmp_path / "copy")
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "PIP_INDEX_URL" in done.stderr and "make wheels" in done.stderr
    assert "Traceback" not in done.stderr and not (script.parent.parent / ".venv" / ".installed").exists()


def test_too_little_disk_is_said_first(monkeypatch):
    install = load()
    monkeypatch.setattr(install, "PYTHON", "nowhere")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    with pytest.raises(SystemExit, match=r"about 4 GB are needed.*1\.0 GB are free"):
        install.check_disk()


def test_the_pinned_versions_are_the_ones_installed():
    """CI tests what constraints.txt says, not what an index happened to serve."""
    from importlib.metadata import PackageNotFoundError, version

    wrong = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, pinned = line.split("==")
            try:
                found = version(name).split("+")[0]
            except PackageNotFoundError:
                continue
            if found != pinned:
                wrong.append(f"{name}: {found}, constraints.txt says {pinned}")
    assert not wrong


def test_every_dependency_has_a_pinned_version():
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wants = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[\w.-]+", w)[0].lower().replace("_", "-") for w in wants}
    pinned = {x.split("==")[0].lower().replace("_", "-") for x in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned, names - pinned


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="not installed by make")
def test_a_second_make_installs_nothing():
    out = subprocess.run(["make", "-n", "cook"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "install.py" not in out and "deepseek-cookbook cook" in out
