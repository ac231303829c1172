"""What all tests share: the root of the repository, no network but loopback, one thread, the built site."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUARD = ROOT / "tests" / "no_network"

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # `make test` has two workers
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)
# Children: Python reads sitecustomize.py from PYTHONPATH before anything else.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(ROOT / "scripts"))

_spec = importlib.util.spec_from_file_location("network_guard", GUARD / "sitecustomize.py")
network_guard = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(network_guard)


def pytest_addoption(parser):
    "`--learning-seed 7` runs learning tests with another seed, `--learning-seed 0-19` with each of twenty."
    parser.addoption("--learning-seed", default="42", metavar="N|N-M", help="of tests marked `learning`")


def learning_seeds(text: str) -> list[int]:
    "The seeds that `--learning-seed` names."
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def pytest_generate_tests(metafunc):
    "Several seeds: a learning test runs once for each of them."
    seeds = learning_seeds(metafunc.config.getoption("--learning-seed"))
    if len(seeds) > 1 and "seed" in metafunc.fixturenames and metafunc.definition.get_closest_marker("learning"):
        metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed{seed}")


@pytest.fixture
def seed(request) -> int:
    "The seed of a learning test."
    return learning_seeds(request.config.getoption("--learning-seed"))[0]


@pytest.fixture
def spread(record_property):
    "Note a number of a learning test and hand it back: scripts/seeds.py prints how it spreads over seeds."

    def note(name: str, value):
        record_property(name, float(value))
        return value

    return note


def pytest_configure(config):
    "A test that must reach a package index says so: `@pytest.mark.network`."
    config.addinivalue_line("markers", "network: may connect to other machines")


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    "Block the network for a test and for the processes that it starts, unless it is marked `network`."
    if request.node.get_closest_marker("network"):
        kept = [p for p in os.environ["PYTHONPATH"].split(os.pathsep) if p != str(GUARD)]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(kept))
        yield
        return
    old = network_guard.block()
    yield
    network_guard.unblock(old)


@pytest.fixture(scope="session")
def root() -> Path:
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="session")
def tracked(root) -> list[Path]:
    "The files that belong to the project: those that git knows or would add."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = [root / name for name in run.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="session")
def site(root, tmp_path_factory):
    "The site, built once: its folder and what the build printed."
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, str(root / "scripts" / "build_docs.py"), "--out", str(out)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    return out, run


@pytest.fixture(scope="session")
def chromium() -> str:
    "The path of a browser."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: apt-get install chromium")
    return found
