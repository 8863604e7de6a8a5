"""What an installation does on a node: as root, from an order of the front end's.

It needs nothing but the standard library, and comes over the remote shell together with the order, so that nothing has
to be there before. It answers with one line of JSON. What it does can be cut off anywhere, and is then completed or
undone by the next order.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Optional

from vmgr.deploy import apply, files, moms, slurmfiles, timer, tree
from vmgr.deploy.apply import Outcome
from vmgr.deploy.hookfiles import is_ours
from vmgr.deploy.manifest import Manifest, Store
from vmgr.deploy.places import (
    LINKED,
    earlier_trees,
    folder_wants,
    folders_to,
    generated_files,
    guest_jobs,
    judge,
    tree_links,
    untrusted,
)
from vmgr.deploy.wants import FILE, FOLDER, TREE, Want
from vmgr.errors import VTorqueError, printable
from vmgr.trust import check_trusted

STATE = "vtorque"
"""The folder of an installation's manifest in TORQUE's home."""
SLURM_STATE = "vtorque-install"
"""The same on a node of Slurm's, where `vtorque` is for jobs."""
KEPT = "vtorque-kept"
"""The folder there for hooks of ours that somebody has changed, when ours are taken away."""
PROGRAM_SECONDS = 60
MAX_NAMED = 8


@dataclass
class Order:
    """What a node is asked for. `hooks` are the sources of the hooks, `config` and `units` texts by their names."""

    action: str
    dry: bool
    prefix: str
    home: str
    tree: str
    toolkit: str
    front: str
    mode: str
    job_type: str
    spool: str
    needed_s: int
    raise_alarm: bool
    python: Sequence[int]
    machine: str
    programs: Sequence[str] = ()
    hooks: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def mom_priv(self) -> str:
        return f"{self.home}/mom_priv"

    @property
    def store(self) -> Store:
        return Store(f"{self.home}/{SLURM_STATE if self.is_slurm else STATE}")

    @property
    def is_slurm(self) -> bool:
        return self.mode == slurmfiles.MODE

    @property
    def kind(self) -> str:
        """Which hooks a node has, for messages."""
        return "Slurm's hooks" if self.is_slurm else f"hooks {self.mode}"


class Refused(Exception):
    """Why a node is not done."""


class NeedsTree(Exception):
    """The node has not got the programs; nothing on it was changed."""


def main(order: Mapping[str, Any], stream: BinaryIO) -> None:
    """Do what the order says and print the answer. `stream` has the tree, as a tar, where the order says so."""
    answer: dict[str, Any]
    os.umask(0o022)
    try:
        has_tree = bool(order["has_tree"])
        wanted = Order(**{name: value for name, value in order.items() if name != "has_tree"})
        answer = perform(wanted, stream if has_tree else None)
    except NeedsTree:
        answer = {"status": "tree", "text": "has no programs yet"}
    except Refused as err:
        answer = {"status": "failed", "text": str(err)}
    except VTorqueError as err:
        answer = {"status": "failed", "text": err.detail}
    except OSError as err:
        answer = {"status": "failed", "text": f"{err.filename or ''}: {err.strerror or err}"}
    except Exception as err:  # the front end names it, and goes on with other nodes
        answer = {"status": "failed", "text": f"{type(err).__name__}: {err}"}
    answer["text"] = printable(answer["text"])
    print(json.dumps(answer), flush=True)


def perform(order: Order, stream: Optional[BinaryIO]) -> dict[str, Any]:
    """Do it; gives the answer. Raises Refused, NeedsTree, VTorqueError, OSError."""
    if os.geteuid() != 0:
        raise Refused("the remote shell gives no root")
    if order.action == "uninstall":
        return _uninstall(order)
    if not order.is_slurm and not os.path.isdir(order.mom_priv):
        raise Refused(f"there is no {order.mom_priv}: --torque-home says where the mom has its folder")
    check_trusted(order.home if order.is_slurm else order.mom_priv)
    return _check(order) if order.action == "check" else _install(order, stream)


def is_shared(order: Order) -> bool:
    """Whether the installation's prefix is the front end's own, on a shared file system."""
    there = moms.content(f"{order.prefix}/.install/id").decode("ascii", "replace").strip()
    return bool(there) and there == order.front


def _fits(order: Order) -> None:
    """Raises Refused where the front end's programs cannot run."""
    here = f"{platform.machine()} with Python {sys.version_info[0]}.{sys.version_info[1]}"
    wanted = f"{order.machine} with Python {order.python[0]}.{order.python[1]}"
    if here != wanted:
        raise Refused(f"it is {here}, and the front end's programs are for {wanted}")
    missing = [name for name in order.programs if shutil.which(name) is None]
    if missing:
        raise Refused(f"it lacks {', '.join(missing)} (contrib/packages.txt)")


def _same_prefix(order: Order, manifest: Optional[Manifest]) -> None:
    there = manifest.facts.get("prefix") if manifest else None
    if there and there != order.prefix:
        raise Refused(f"its hooks are those of another installation in {there}: take that away first")


def _own_place(order: Order, manifest: Optional[Manifest]) -> None:
    """Whether the programs can lie in the prefix of this node.

    Raises VTorqueError (VT-TRUST) where others than root could change them, Refused where something else lies there.
    """
    missing = folders_to(order.prefix)
    check_trusted(os.path.dirname(missing[0]) if missing else order.prefix)
    if os.path.lexists(f"{order.prefix}/.install"):
        raise Refused(f"{order.prefix} is an installation of its own: ./install.sh --uninstall there first")
    known = manifest.entries if manifest else {}
    for name in LINKED:
        path = f"{order.prefix}/{name}"
        if path not in known and os.path.isdir(path) and not os.path.islink(path):
            raise Refused(f"{path} is of something else, or of an installation by hand: remove {order.prefix} first")


# --- what is wanted


def wants_of(order: Order, manifest: Optional[Manifest], make: Any = None) -> list[Want]:
    """All that should lie on this node, in the order in which it is made."""
    wants = [] if is_shared(order) else _own_tree(order, manifest, make)
    wants += timer.wants(order.units)
    if order.is_slurm:
        return wants
    wants += moms.hook_wants(order.mom_priv, _hooks(order))
    if order.raise_alarm or _raised(order, manifest):
        want = moms.alarm_want(order.mom_priv, order.needed_s, manifest)
        wants += [want] if want else []
    return wants


def _hooks(order: Order) -> moms.Hooks:
    return moms.Hooks(order.mode, order.job_type, order.prefix, order.spool, order.hooks)


def _raised(order: Order, manifest: Optional[Manifest]) -> bool:
    return manifest is not None and f"{order.mom_priv}/config" in manifest.entries


def _own_tree(order: Order, manifest: Optional[Manifest], make: Any) -> list[Want]:
    prefix = order.prefix
    wants = folder_wants(prefix, manifest)
    for name in ("trees", "etc", "etc/vtorque", "etc/vtorque/vm"):
        wants.append(Want(f"{prefix}/{name}", FOLDER, 0o755))
    wants.append(Want(f"{prefix}/trees/{order.tree}", TREE, 0o755, make=make or _no_tree))
    wants += tree_links(prefix, order.tree)
    for name, (data, mode) in order.config.items():
        wants.append(Want(f"{prefix}/etc/vtorque/{name}", FILE, mode, base64.b64decode(data)))
    return wants + moms.samples(f"{prefix}/mom_priv_hooks", _hooks(order))


def _no_tree(_: str) -> None:
    raise NeedsTree


# --- install


def _install(order: Order, stream: Optional[BinaryIO]) -> dict[str, Any]:
    _fits(order)
    store = order.store
    manifest = store.load()
    _same_prefix(order, manifest)
    shared = is_shared(order)
    own = f"{order.prefix}/trees/{order.tree}"
    if shared:
        check_trusted(f"{order.prefix}/current/libexec")
    else:
        _own_place(order, manifest)
    if not shared and not tree.is_sealed(own) and stream is None and not order.dry:
        raise NeedsTree
    if order.dry:
        outcome = apply.converge(store, wants_of(order, manifest), toolkit=order.toolkit, facts={}, dry=True)
        return _told(
            "ok", outcome, f"would be changed in {len(outcome.made)} places" if outcome.made else "nothing to do"
        )
    if not os.path.isdir(store.folder):
        store.make()
    with store.held():
        manifest = store.load()
        previous, also = earlier_trees(manifest, order.tree)
        facts = {"prefix": order.prefix, "tree": order.tree, "previous": previous, "mode": order.mode}
        wants = wants_of(order, manifest, None if stream is None else lambda path: unpack(stream, path))
        outcome = apply.converge(store, wants, toolkit=order.toolkit, facts=facts, also=also)
        if not shared and (outcome.changed or not os.path.exists(generated_files(order.prefix)[0])):
            _run([f"{order.prefix}/bin/vmgr", "config", "compile"])
        timer.start(order.units, outcome.made)
    told = "installed" if outcome.changed else "is current"
    told += f", {order.kind}, prefix {'shared' if shared else 'of its own'}"
    if outcome.moved:
        told += f", moved aside: {_names(order, outcome.moved)}"
    answer = _told("ok", outcome, told)
    if order.is_slurm:
        return answer
    problem = moms.alarm_problem(order.mom_priv, order.needed_s)
    answer["kept"] += moms.choosable(order.mom_priv, order.mode, order.job_type)
    if problem:
        answer["kept"].append(f"{problem}: --prologalarm raise sets it")
    elif f"{order.mom_priv}/config" in outcome.made:
        answer["text"] += ", $prologalarm raised (pbs_mom reads it when it starts, or on HUP)"
    return answer


def unpack(stream: BinaryIO, folder: str) -> None:
    """Unpack a tree from a tar that root has made, and give it its name when all that its seal names is there.

    Raises Refused for one that did not arrive whole.
    """
    part = files.beside(folder)
    files.remove(part)
    os.mkdir(part, 0o700)
    try:
        with tarfile.open(fileobj=stream, mode="r|gz") as tar:
            # from the front end's root; newer Pythons refuse links out of it, such as that to the interpreter
            tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
            tar.extractall(part, numeric_owner=True)
    except (tarfile.TarError, EOFError, OSError) as err:
        files.remove(part)
        raise Refused(f"the programs did not arrive whole: {err}") from err
    missing = sorted(tree.sealed_listing(part).keys() - tree.names(part))
    if missing or not tree.is_sealed(part):
        files.remove(part)
        raise Refused(f"the programs did not arrive whole: {', '.join(missing[:3]) or 'no list of them'}")
    tree.flush(part)
    files.remove(folder)
    os.rename(part, folder)
    files.flush_folder(os.path.dirname(folder))


# --- uninstall


def _uninstall(order: Order) -> dict[str, Any]:
    store = order.store
    files.remove(files.beside(store.folder))
    if not os.path.isdir(store.folder):
        return {"status": "ok", "text": "has nothing of vTorque", "kept": []}
    manifest = store.load()
    _same_prefix(order, manifest)
    jobs = guest_jobs(order.spool)
    if jobs:
        raise Refused(f"guest jobs are there ({', '.join(jobs[:MAX_NAMED])}): again when they have ended")
    if not order.dry:
        timer.stop(manifest)
    own = manifest is not None and f"{order.prefix}/current" in manifest.entries
    generated = generated_files(order.prefix) if own else []
    with store.held():
        outcome = apply.undo_all(store, kept=lambda path: _kept(order, path), generated=generated, dry=order.dry)
    if order.dry:
        return _told("ok", outcome, f"would lose {len(outcome.removed)} files and folders")
    timer.forget(outcome.removed)
    told = "vTorque removed"
    if outcome.restored:
        told += f", given back: {_names(order, outcome.restored)}"
    return _told("ok", outcome, told)


def _kept(order: Order, path: str) -> Optional[str]:
    """Where a changed hook of ours goes: it calls programs that are no longer there, so no mom may run it."""
    if os.path.dirname(path) != order.mom_priv or not is_ours(moms.content(path)):
        return None
    folder = f"{order.home}/{KEPT}"
    os.makedirs(folder, 0o700, exist_ok=True)
    return files.free_name(f"{folder}/{os.path.basename(path)}")


# --- check


def _check(order: Order) -> dict[str, Any]:
    """Compare all that was installed with what it should be, without changing anything."""
    manifest = order.store.load()
    if manifest is None:
        return {"status": "problems", "text": "vTorque is not installed", "kept": []}
    problems = []
    try:
        _fits(order)
        _same_prefix(order, manifest)
    except Refused as err:
        problems.append(str(err))
    _, also = earlier_trees(manifest, order.tree)
    wants = wants_of(order, manifest)
    outcome = apply.converge(order.store, wants, toolkit=order.toolkit, facts={}, also=also, dry=True)
    problems += judge(manifest, outcome, wants, order.toolkit)
    if not is_shared(order):
        here = f"{order.prefix}/trees/{order.tree}"
        if tree.is_sealed(here):
            problems += [f"{here}/{path} was changed" for path in tree.differences(here)]
    problems += untrusted([want.path for want in wants])
    late = None if order.is_slurm else moms.alarm_problem(order.mom_priv, order.needed_s)
    further = (late, timer.problem(order.units))
    problems += [each for each in further if each is not None]
    try:
        _run([f"{order.prefix}/bin/vmgr", "config", "check"])
    except Refused as err:
        problems.append(str(err))
    if problems:
        more = f" and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        return {"status": "problems", "text": "; ".join(problems[:MAX_NAMED]) + more, "kept": []}
    told = f"vTorque {manifest.toolkit}, {order.kind}, all as installed"
    return {"status": "ok", "text": told, "kept": []}


# --- small things


def _run(argv: Sequence[str]) -> None:
    """Run a program. Raises Refused with the last line that it says when it fails."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROGRAM_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise Refused(f"{argv[0]}: {err}") from err
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Refused(f"{' '.join(argv)}: {said[-1] if said else f'status {done.returncode}'}")


def _names(order: Order, paths: Sequence[str]) -> str:
    """Which hooks in `mom_priv` these are."""
    hooks = (os.path.basename(path) for path in paths if path != f"{order.mom_priv}/config")
    return ", ".join(sorted(hooks)) or "no hook"


def _told(status: str, outcome: Outcome, text: str) -> dict[str, Any]:
    return {"status": status, "text": text, "kept": outcome.kept, "changed": outcome.changed}
