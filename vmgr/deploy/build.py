"""Builds the programs of an installation from a checkout: a tree with a virtual environment and all that is in it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.deploy import files, tree
from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with
from vmgr.signals import undisturbed

PARTS = (
    "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vsub", "vmgr", "mom_priv_hooks", "templates", "contrib",
    "man", "install.sh",
)  # fmt: skip
"""What of a checkout is installed; a change of any of it makes another tree."""

LAUNCHERS = (
    ("bin/vmgr", "vmgr.cli", "main"),
    ("libexec/vtorque-vsub", "vsub.start", "main"),
    ("libexec/vtorque-hook", "vmgr.node.hook", "main"),
    ("libexec/vtorque-agent", "vmgr.node.agent", "main"),
    ("libexec/vtorque-user-prologue", "vmgr.node.barrier", "main"),
    ("libexec/vtorque-job", "vmgr.node.wrapper", "main"),
    ("libexec/vtorque-batch", "vsub.batch", "main"),
    ("libexec/vtorque-local", "vsub.programs", "local_daemon"),
    *((f"libexec/local/{name}", "vsub.programs", f"local_{name}") for name in (
        "qsub", "qstat", "qdel", "qrerun", "qhold", "qrls",
    )),
)  # fmt: skip
"""Programs of the tree: their path in it, and the function that they call."""

COMPLETIONS = {
    "bash": "bash-completion/completions/vmgr",
    "zsh": "zsh/site-functions/_vmgr_completion",
    "fish": "fish/vendor_completions.d/vmgr.fish",
}
"""Where the shells look for completions, below a `share` folder."""

_MADE = ("__pycache__", ".pyc", ".egg-info")


class Source(NamedTuple):
    """A checkout, and what its tree is called: by its version, its content, and the Python that runs it."""

    folder: str
    version: str
    name: str

    @property
    def hooks(self) -> dict[str, str]:
        """The sources of the hooks, by their paths in `mom_priv_hooks`."""
        folder = Path(self.folder, "mom_priv_hooks")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {os.fspath(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths}


def source_at(folder: str, version: str, python: str) -> Source:
    """The checkout in a folder. Raises VTorqueError: VT-CONFIG for what is none, VT-VALUE, VT-BUILD for the Python."""
    found: list[str] = []
    for part in PARTS:
        path = f"{folder}/{part}"
        if not os.path.exists(path):
            raise VTorqueError(f"{folder} is no whole checkout: it has no {part}", code=Code.CONFIG)
        found += [path] if os.path.isfile(path) else [each for each in files.below(path) if os.path.isfile(each)]
    lines = [
        f"{files.digest_of(os.path.realpath(path))} {os.path.relpath(path, folder)}"
        for path in sorted(found)
        if not any(part in path for part in _MADE)
    ]
    lines.append(_output([python, "-I", "-c", "import sys; print(sys.version)"], f"--python {python}"))
    digest = files.digest_of_bytes("\n".join(lines).encode())
    return Source(folder, version, f"{version}-{digest[:16]}")


def build(source: Source, prefix: str, path: str, python: str, wheels: Optional[str], work: str) -> None:
    """Build the tree of a checkout at `path`, where it stays, below `prefix`; sealed when it is whole.

    `work` is a folder for what is needed for a while. Raises VTorqueError (VT-BUILD).
    """
    copy, temporary = f"{work}/source", f"{work}/tmp"
    for folder in (copy, temporary):
        os.mkdir(folder)
    for part in PARTS:
        _copy(f"{source.folder}/{part}", f"{copy}/{part}")
    os.mkdir(path, 0o755)
    _run([python, "-I", "-m", "venv", f"{path}/venv"], temporary)
    pip = [f"{path}/venv/bin/python3", "-I", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    pip += ["--no-index", "--find-links", wheels] if wheels else []
    _run([*pip, "setuptools", "wheel"], temporary)
    _run([*pip, "--no-build-isolation", copy], temporary)
    share = f"{path}/share/vtorque"
    os.makedirs(share)
    _copy(f"{copy}/templates", f"{share}/templates")
    _copy(f"{copy}/contrib", f"{share}/contrib")
    _copy(f"{copy}/mom_priv_hooks", f"{share}/hooks")
    os.symlink(f"{prefix}/mom_priv_hooks", f"{share}/mom_priv_hooks")
    _programs(copy, prefix, path)
    os.makedirs(f"{path}/share/man/man1")
    for page in sorted(Path(copy, "man").glob("*.1")):
        _copy(os.fspath(page), f"{path}/share/man/man1/{page.name}")
    for shell, name in COMPLETIONS.items():
        target = f"{path}/share/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        program = f"from vmgr.cli import main; sys.exit(main(['completion', {shell!r}]))"
        Path(target).write_text(run_python(path, program), encoding="utf-8")
    _give_to_root(path)
    tree.seal(path)


def _copy(source: str, target: str) -> None:
    if os.path.isdir(source):
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copy(source, target)


def packages(path: str) -> str:
    """The folder of a tree's Python packages. Raises VTorqueError (VT-BUILD) where there is none."""
    found = sorted(Path(path, "venv", "lib").glob("python3*/site-packages"))
    if not found:
        raise VTorqueError(f"{path} has no Python packages", code=Code.BUILD)
    return os.fspath(found[0])


def _programs(work: str, prefix: str, path: str) -> None:
    """The programs: run by the interpreter of the present tree, with the packages of their own."""
    place = packages(path)
    for name, module, function in LAUNCHERS:
        target = Path(path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            f'#!{prefix}/venv/bin/python3 -IS\nimport sys\nsys.path.insert(0, "{place}")\n'
            f"from {module} import {function} as main\nsys.exit(main(sys.argv[1:]))\n",
            encoding="utf-8",
        )
        target.chmod(0o755)
    front = Path(path, "bin", "vsub")
    front.write_text(Path(work, "contrib", "bin", "vsub").read_text().replace("@PREFIX@", prefix), encoding="utf-8")
    front.chmod(0o755)


def _give_to_root(path: str) -> None:
    for each in [path, *files.below(path)]:
        os.lchown(each, 0, 0)
        if not os.path.islink(each):
            os.chmod(each, os.stat(each).st_mode & 0o7755 | 0o444)


def run_python(path: str, program: str, *arguments: str) -> str:
    """What a program in Python prints, run with a tree's packages. Raises VTorqueError (VT-BUILD)."""
    place = packages(path)
    code = f"import sys; sys.path.insert(0, {place!r}); {program}"
    return _output([f"{path}/venv/bin/python3", "-IS", "-c", code, *arguments], path)


_KEYS = """
import json
from vmgr.schema import SCHEMA
from collections.abc import Mapping
def keys(section, at=""):
    for name, kind in section.items():
        if isinstance(kind, Mapping):
            yield from keys(kind, at + name + ".")
        else:
            yield at + name, [repr(getattr(kind, "default", None)), getattr(kind, "doc", "")]
print(json.dumps(dict(keys(SCHEMA))))
"""


def settings(path: str, prefix: str) -> dict[str, Any]:
    """The configuration of an installation as a tree's programs read it. Raises VTorqueError (VT-CONFIG)."""
    program = "from vmgr.deploy.settings import tell; tell(sys.argv[1])"
    found: dict[str, Any] = json.loads(run_python(path, program, prefix))
    if "error" in found:
        raise VTorqueError(found["error"], code=Code.CONFIG, hint="nothing of the earlier version was changed")
    return found


def config_keys(path: str) -> dict[str, list[str]]:
    """The keys of the configuration that a tree's programs know, with default and meaning."""
    found: dict[str, list[str]] = json.loads(run_python(path, _KEYS))
    return found


def machine() -> tuple[str, list[int]]:
    """What the programs run on: the machine, and the version of Python."""
    return platform.machine(), [*sys.version_info[:2]]


def _output(argv: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as err:
        raise VTorqueError(f"{what}: {err.strerror}", code=Code.VALUE) from err
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise VTorqueError(f"{what}: {said[-1] if said else f'status {done.returncode}'}", code=Code.BUILD)
    return done.stdout


def _run(argv: Sequence[str], temporary: str) -> None:
    """Run a step of the building, with `temporary` as its place for a while; what it says is for the reader.

    It ends with us, and with all that it has started when we are interrupted. Raises VTorqueError (VT-BUILD).
    """
    child: Optional[subprocess.Popen[bytes]] = None
    try:
        with undisturbed() as mask:  # an exception of a signal's would lose what has just been started
            child = _start(argv, temporary, mask)
        status = child.wait()
    except BaseException:
        if child is not None:
            with undisturbed():
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # its own children would go on in what is removed
                child.wait()
        raise
    if status:
        raise VTorqueError(f"{' '.join(argv)} ended with {status}", code=Code.BUILD, hint="see what it said")


def _start(argv: Sequence[str], temporary: str, mask: Iterable[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env={**os.environ, "TMPDIR": temporary},
        start_new_session=True,
        preexec_fn=dies_with(os.getpid(), mask=mask),
    )
