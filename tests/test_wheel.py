"""The wheel, in a fresh environment, has every public name and the settings; nothing comes from the tree."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PROBE = """
import importlib, json, sys
import deepseek_cookbook as package
names = {}
for name in package.__all__:
    try: names[name] = type(getattr(package, name)).__name__
    except Exception as error: names[name] = f"ERROR {type(error).__name__}: {error}"
settings = package.load_settings("tiny")
where = {"file": package.__file__, "settings": str(settings.path)}
print(json.dumps({**where, "names": names, "profile": settings.profile}))
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    "The wheel, built from a copy of the files that git knows."
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    new = ["git", "ls-files", "--others", "--exclude-standard", "-z", "deepseek_cookbook"]
    names += subprocess.run(new, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = root / name, copy / name
        if not (source.is_file() or source.is_symlink()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(source)) if source.is_symlink() else target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict:
    "What the package says in a fresh environment that sees the third-party packages of this one, but not the tree."
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:  # what pip does for a pure wheel, without pip
        archive.extractall(packages)
    # A folder added by a .pth file has its own .pth files ignored: the editable install stays out of sight.
    (packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = subprocess.run([str(python), "-c", PROBE], cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return {**json.loads(run.stdout.strip().splitlines()[-1]), "packages": str(packages)}


def test_wheel_holds_the_package_and_nothing_else(wheel, root):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(root).as_posix() for p in (root / "deepseek_cookbook").rglob("*.py")}
    assert modules - set(names) == set()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"deepseek_cookbook"}


def test_wheel_has_the_settings(wheel, root):
    inside = zipfile.ZipFile(wheel).read("deepseek_cookbook/settings.ini")
    assert inside == (root / "settings.ini").read_bytes()


def test_wheel_has_the_licence(wheel):
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_every_public_name_imports(installed):
    assert installed["file"].startswith(installed["packages"])
    assert {name: kind for name, kind in installed["names"].items() if kind.startswith("ERROR")} == {}


def test_settings_come_from_the_wheel(installed):
    assert installed["settings"].startswith(installed["packages"])
    assert installed["profile"] == "tiny"
