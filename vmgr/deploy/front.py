"""An installation on the front end: its programs, its configuration, and what users need to find it."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.deploy import apply, build, files, hookfiles, moms, outside, slurmconf, slurmfiles, slurmsite, timer, tree
from vmgr.deploy.apply import Outcome
from vmgr.deploy.build import Source
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
from vmgr.errors import Code, VTorqueError
from vmgr.trust import check_trusted

STATE = ".install"
BEFORE = "before"
"""The tree of what was installed before there were trees."""
LOCK = ".lock"
"""What an installation from before there were trees has in its prefix."""
INSTALLED = ".installed"
"""What the tests and quickstart.sh look at: it changes with what is installed."""


NOTED = ("engine", "spool", "mom_priv", "slurm_bin")
"""What the manifest notes of a Site, for taking all away whatever becomes of the configuration."""


class Site(NamedTuple):
    """What the configuration says that an installation must know."""

    engine: str
    spool: str = "/var/spool/vtorque"
    local: str = ""
    mom_priv: str = ""
    job_type: Optional[str] = hookfiles.DEFAULT_JOB_TYPE
    barrier_s: int = 0
    disk_s: int = 0
    slurm_bin: str = ""


def site_of(tree_of_settings: Mapping[str, Any]) -> Site:
    """The values of a configuration."""
    config = tree_of_settings
    return Site(
        config["engine"], config["paths"]["spool"], config["local"]["spool"], config["torque"]["mom_priv"],
        config["submit"].get("job_type"), config["timeouts"]["barrier"], config["timeouts"]["disk"],
        slurmconf.commands_folder(config["slurm"]["bin"], os.uname().nodename),
    )  # fmt: skip


class Front:
    """The installation in a prefix of this machine."""

    def __init__(self, prefix: str, source: Source, *, python: str, wheels: Optional[str], links: bool) -> None:
        self.prefix = prefix
        self.source = source
        self.python = python
        self.wheels = wheels
        self.links = links
        self.store = Store(f"{prefix}/{STATE}", 0o755)
        self.tree = f"{prefix}/trees/{source.name}"
        self.config = f"{prefix}/etc/vtorque/vtorque.yaml"

    @property
    def book(self) -> str:
        """Where the nodes are written down."""
        return f"{self.store.folder}/nodes.json"

    @property
    def work(self) -> str:
        """Where it puts what it needs while it builds."""
        return f"{self.store.folder}/work"

    def id(self) -> str:
        """What tells this installation from others: nodes that see it share the prefix. Empty where there is none."""
        return moms.content(f"{self.store.folder}/id").decode("ascii", "replace").strip()

    @property
    def slurm_lines(self) -> str:
        """Where the lines for slurm.conf lie."""
        return f"{self.prefix}/etc/vtorque/slurm.conf.vtorque"

    def engine(self) -> Optional[str]:
        """The batch system that the configuration says or, without one, what is installed; None without either."""
        said = engine_in(moms.content(self.config).decode("utf-8", "replace"))
        manifest = self.store.load()
        return said or (manifest.facts.get("engine") if manifest else None)

    def noted(self) -> Site:
        """What the configuration said at the last installation, as far as it is noted; the defaults for the rest."""
        manifest = self.store.load()
        facts = manifest.facts if manifest else {}
        known: dict[str, Any] = {"engine": "torque", **{name: facts[name] for name in NOTED if name in facts}}
        return Site(**known)

    def config_files(self) -> dict[str, tuple[str, int]]:
        """The configuration and the VM hooks beside it, by their names below `etc/vtorque`, coded in base64."""
        found = {}
        folder = Path(self.config).parent
        for path in sorted([*folder.glob("*"), *folder.glob("vm/*")]):
            hidden = path.name.startswith(".") or path.suffix in (".compiled", ".front")
            if path.is_file() and not path.is_symlink() and not hidden:
                data = base64.b64encode(path.read_bytes()).decode()
                found[os.fspath(path.relative_to(folder))] = (data, path.stat().st_mode & 0o755)
        return found

    def units(self) -> dict[str, str]:
        """The units of the janitor's timer, for this prefix."""
        folder = Path(self.source.folder, "contrib", "systemd")
        return {
            name: hookfiles.fill_unit((folder / name).read_text(), prefix=self.prefix)
            for name in hookfiles.unit_files()
        }

    def _own_units(self, site: Site) -> dict[str, str]:
        """Those of this machine itself: only the embedded batch system has guests on it."""
        return self.units() if self.links and site.engine == "local" else {}

    def is_there(self) -> bool:
        return self.store.load() is not None

    # --- install

    def prepare(self) -> None:
        """Make the prefix and the folder of the manifest.

        Raises VTorqueError: VT-TRUST, VT-CONFIG; VT-VALUE where something else lies in the prefix.
        """
        missing = folders_to(self.prefix)
        others = [name for name in LINKED if _is_folder(f"{self.prefix}/{name}")]
        if others and not self.is_there() and not os.path.exists(f"{self.prefix}/{LOCK}"):
            raise VTorqueError(
                f"{self.prefix} has a folder {others[0]} that is not of install.sh",
                code=Code.VALUE,
                hint="choose another --prefix",
            )
        check_trusted(os.path.dirname(missing[0]) if missing else self.prefix)
        if not os.path.isdir(self.store.folder):
            self.store.make(missing)

    def programs(self, config: bytes) -> list[Want]:
        """The tree, and the configuration where there is none."""
        folders = ("trees", "etc", "etc/vtorque", "etc/vtorque/vm")
        return [
            *(Want(f"{self.prefix}/{name}", FOLDER, 0o755) for name in folders),
            Want(self.tree, TREE, 0o755, make=self._build),
            Want(self.config, FILE, 0o644, config, once=True),
        ]

    def _build(self, path: str) -> None:
        files.remove(self.work)
        os.mkdir(self.work, 0o700)
        try:
            build.build(self.source, self.prefix, path, self.python, self.wheels, self.work)
        except (VTorqueError, OSError):
            files.remove(path)  # on a disk that is full, others need the room
            raise
        finally:
            files.remove(self.work)

    def wants(self, config: bytes, site: Site, front: str) -> list[Want]:
        """All of it, in the order in which it is made: what a mom runs comes after what that needs."""
        hooks = moms.Hooks(hookfiles.WRAP, hookfiles.DEFAULT_JOB_TYPE, self.prefix, site.spool, self.source.hooks)
        manifest = self.store.load()
        wants = self.programs(config)
        wants.append(Want(f"{self.store.folder}/id", FILE, 0o644, f"{front}\n".encode()))
        wants += tree_links(self.prefix, self.source.name)
        wants += moms.samples(f"{self.prefix}/mom_priv_hooks", hooks)
        if site.engine == slurmfiles.MODE:
            wants.append(Want(self.slurm_lines, FILE, 0o644, slurm_text(self.prefix).encode()))
        if site.engine == "local":
            mom_priv = f"{site.local}/mom_priv"
            wants += folder_wants(mom_priv, manifest)
            wants += moms.hook_wants(mom_priv, hooks)
        if self.links:
            wants += outside.wants(self.prefix, manifest)
        wants += timer.wants(self._own_units(site))
        wants.append(Want(f"{self.prefix}/{INSTALLED}", FILE, 0o644, f"{self.source.name}\n".encode()))
        return wants

    def build_programs(self, config: bytes) -> Site:
        """Make the programs and the first configuration; what runs is not touched yet.

        Raises VTorqueError: VT-BUILD, and VT-CONFIG for a configuration that the new programs do not take.
        """
        manifest = self.store.load() or Manifest()
        apply.converge(
            self.store, self.programs(config), toolkit=manifest.toolkit, facts=manifest.facts, also=manifest.entries
        )
        return site_of(build.settings(self.tree, self.prefix))

    def switch(self, config: bytes, site: Site) -> Outcome:
        """Make all of it so, the programs that were built the present ones."""
        manifest = self.store.load() or Manifest()
        self._adopt()
        front = str(manifest.facts.get("id") or uuid.uuid4())
        previous, also = earlier_trees(manifest, self.source.name)
        wants = self.wants(config, site, front)
        before = f"{self.prefix}/trees/{BEFORE}"
        if previous is None and os.path.isdir(before):
            previous, also = BEFORE, []
            wants.append(Want(before, TREE, 0o755))
        facts = {"id": front, "tree": self.source.name, "previous": previous, "links": self.links}
        facts.update({name: getattr(site, name) for name in NOTED})
        outcome = apply.converge(self.store, wants, toolkit=self.source.version, facts=facts, also=also)
        if outcome.changed and previous not in (None, BEFORE):
            earlier = f"{self.prefix}/trees/{previous}"
            outcome.kept += [f"{earlier}/{path} was changed; it is used no more" for path in tree.differences(earlier)]
        program = "from vmgr.deploy.settings import compile_; compile_(*sys.argv[1:])"
        build.run_python(self.tree, program, self.prefix, "again" if outcome.changed else "")
        timer.start(self._own_units(site), outcome.made)
        return outcome

    def _adopt(self) -> None:
        """Turn the folders of an installation that had no trees into links, each in one step where that is possible."""
        old = [name for name in LINKED if _is_folder(f"{self.prefix}/{name}")]
        if not old:
            return
        files.write_link(f"{self.prefix}/current", f"trees/{self.source.name}")
        for name in old:
            path, link = f"{self.prefix}/{name}", files.beside(f"{self.prefix}/{name}")
            files.remove(link)
            os.symlink(f"current/{name}", link)
            if not files.exchange(path, link):
                away = files.beside(f"{self.prefix}/old-{name}")
                os.rename(path, away)
                os.rename(link, path)
                os.rename(away, link)
            os.makedirs(f"{self.prefix}/trees/{BEFORE}", exist_ok=True)
            os.rename(link, files.free_name(f"{self.prefix}/trees/{BEFORE}/{name}"))
        files.remove(f"{self.prefix}/{LOCK}")

    def new_keys(self) -> list[str]:
        """What the configuration can say since the version that is installed now, one line a key."""
        current = f"{self.prefix}/current"
        before = current if os.path.exists(current) else self.prefix
        if not os.path.isdir(f"{before}/venv") or os.path.realpath(current) == self.tree:
            return []
        try:
            old = build.config_keys(before)
        except (VTorqueError, ValueError):
            return []
        new = build.config_keys(self.tree)
        return [f"{key} (default {default}): {text}" for key, (default, text) in new.items() if key not in old]

    # --- check

    def check(self, config: bytes) -> list[str]:
        """What is not as it should be; changes nothing. Raises VTorqueError (VT-CONFIG)."""
        manifest = self.store.load()
        if manifest is None:
            return ["vTorque is not installed"]
        if not manifest.facts.get("tree"):
            return ["an installation was cut off: run it again"]
        if not tree.is_sealed(self.tree):
            return [f"has version {manifest.toolkit} ({manifest.facts.get('tree')}), not {self.source.name}"]
        site = site_of(build.settings(self.tree, self.prefix))
        self.links = bool(manifest.facts.get("links"))
        wants = self.wants(config, site, self.id())
        _, also = earlier_trees(manifest, self.source.name)
        outcome = apply.converge(self.store, wants, toolkit=self.source.version, facts={}, also=also, dry=True)
        problems = judge(manifest, outcome, wants, self.source.version)
        problems += [f"{self.tree}/{path} was changed" for path in tree.differences(self.tree)]
        idle = timer.problem(self._own_units(site))
        problems += [idle] if idle else []
        return problems + untrusted([want.path for want in wants])

    # --- uninstall

    def uninstall(self, *, dry: bool) -> Outcome:
        """Take it away. Raises VTorqueError (VT-ACCESS) while guest jobs run on this machine."""
        for path in [self.prefix, *map(os.fspath, Path(self.prefix).parents)][:-1]:
            files.remove(files.beside(path))  # what a killed installation has left
        manifest = self.store.load()
        if manifest is not None and manifest.facts.get("engine") == "local":
            jobs = guest_jobs(str(manifest.facts["spool"]))
            if jobs:
                raise VTorqueError(
                    f"guest jobs are there ({', '.join(jobs[:5])})", code=Code.ACCESS, hint="again when they have ended"
                )
            self._stopped()
        generated = [*generated_files(self.prefix), self.book, files.beside(self.book), self.work]
        if not dry:
            timer.stop(manifest)
        outcome = apply.undo_all(self.store, generated=generated, dry=dry)
        if not dry:
            timer.forget(outcome.removed)
        return outcome

    def _stopped(self) -> None:
        """Raises VTorqueError (VT-ACCESS) while the embedded batch system runs."""
        program = f"{self.prefix}/libexec/vtorque-local"
        if os.path.exists(program) and not subprocess.run([program, "status"], capture_output=True).returncode:
            raise VTorqueError("the embedded batch system runs", code=Code.ACCESS, hint=f"{program} stop")


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def slurm_text(prefix: str) -> str:
    """The lines for slurm.conf, as they lie beside the configuration."""
    lines = slurmfiles.conf_lines(slurmsite.hooks_folder(prefix))
    return "\n".join(["# For slurm.conf, which install.sh does not edit; then: scontrol reconfigure", *lines, ""])


_ENGINE = re.compile(r"^engine:[ ]*[\"']?([a-z]+).*$", re.MULTILINE)


def engine_in(text: str) -> Optional[str]:
    """The batch system that the text of a configuration names; None where it does not, in the usual form."""
    match = _ENGINE.search(text)
    return match[1] if match else None


_SLURM_BIN = re.compile(
    r"^slurm:[ ]*(?:\{(?:[^}\n]*,)?|(?:#.*)?\n(?:(?:[ ]+.*|[ ]*#.*)?\n)*?)[ ]*bin:[ ]*[\"']?(/[^\s\"',}#]+)",
    re.MULTILINE,
)


def slurm_bin_in(text: str) -> str:
    """The folder of Slurm's commands that the text of a configuration names; empty where it does not, in such a form.

    For an installation that has no YAML yet.
    """
    match = _SLURM_BIN.search(text)
    return match[1].rstrip("/") if match else ""


def first_config(path: str, prefix: str, torque_home: Optional[str], engine: Optional[str] = None) -> bytes:
    """The configuration to start with, for a batch system. Raises VTorqueError (VT-VALUE)."""
    try:
        text = Path(path).read_text(encoding="utf-8").replace("@PREFIX@", prefix)
    except (OSError, UnicodeDecodeError) as err:
        raise VTorqueError(f"--config {path} cannot be read: {err}", code=Code.VALUE) from err
    if torque_home is not None and "\ntorque:" not in text:
        text += f"\ntorque:\n  mom_priv: {torque_home}/mom_priv\n"
    if engine is not None and engine_in(text) is None:
        text += f"\nengine: {engine}\n"
    elif engine is not None:
        text = _ENGINE.sub(f"engine: {engine}", text, count=1)
    return text.encode()
