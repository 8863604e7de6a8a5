"""Jobs of a node without a batch system: a real account, a real agent and its guest, and the job wrapper as the job.

Agent and wrapper are forks of the test's own process, so that nothing has to be installed where that account can read.
"""

from __future__ import annotations

import asyncio
import os
import pty
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from guestmachine import make_key
from guestsetup import POOL
from screen import PATIENCE_S, Screen, set_size

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))  # nodesite

import inotify_simple  # noqa: F401  # the account cannot read it any more once a fork has become that account
from nodesite import TEMPLATES, Node, a_spec, make_node

from vmgr import logs
from vmgr.jobspec import GuestGroup, SpecPath, dump_spec, spec_hash
from vmgr.node import record, wrapper
from vmgr.node.agent import run_attempt
from vmgr.node.checkedjob import Call
from vmgr.node.hookargs import member_index

SIZE = (40, 100)


@contextmanager
def account() -> Iterator[pwd.struct_passwd]:
    """A real account, whose home is taken away with it."""
    name = f"vt{secrets.token_hex(4)}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=True, stderr=subprocess.DEVNULL)


def fork(work: Callable[[], int]) -> int:
    """A child that ends with the status that `work` gives."""
    pid = os.fork()
    if pid == 0:
        _as_child(work)
    return pid


def _as_child(work: Callable[[], int]) -> None:
    status = 99
    try:
        status = work()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


class Job:
    """One job, or member of an array, of `owner`; use it as a context manager. `facts` are further ones of its call."""

    def __init__(self, node: Node, owner: pwd.struct_passwd, path: SpecPath, job_id: str, **facts: Any) -> None:
        self.node, self.owner, self.path, self.job_id = node, owner, path, job_id
        self.facts = facts
        self.directory = Path(path.directory)
        self.agent = 0
        self.wrapper = 0
        self.screen = Screen(-1)

    def __enter__(self) -> Job:
        place = record.new_place(self.node.config.paths, self.job_id)
        member = member_index(self.job_id)
        facts: dict[str, Any] = {
            "job_id": self.job_id, "user": self.owner.pw_name, "directory": list(self.path), "node_index": 0,
            "queue": "batch", "tag": None if member is None else str(member), **self.facts,
        }  # fmt: skip
        lock, listener = record.create(place, facts)
        call = Call(**{**facts, "directory": self.path})
        self.agent = fork(lambda: self._be_agent(place, call, listener))
        os.close(lock)
        listener.close()
        return self

    def _be_agent(self, place: record.Place, call: Call, listener: socket.socket) -> int:
        log = logs.set_up(self.node.config.logging, job=self.job_id, reader=self.owner.pw_uid)
        os.setsid()
        asyncio.run(run_attempt(self.node.config, self.node.base / "templates", place, call, log, listener))
        return 0

    def __exit__(self, *_: object) -> None:
        if self.screen.fd >= 0:
            self.screen.close()
        for pid in filter(None, (self.wrapper, self.agent)):
            self._wait(pid, lambda pid=pid: os.kill(pid, signal.SIGKILL))
        assert self.node.left() == []

    def _wait(self, pid: int, late: Callable[[], None]) -> int:
        fd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        in_time = bool(poll.poll(PATIENCE_S * 1000))
        os.close(fd)
        if not in_time:
            late()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def start(self, *argv: str, interactive: bool = True, **environ: str) -> None:
        """Start the wrapper as a batch system starts a job: as the leader of a session, its terminal the test's."""
        if interactive:
            self.wrapper, ours = pty.fork()
        else:
            ours, theirs = os.pipe()
            self.wrapper = os.fork()
        if self.wrapper == 0:
            if interactive:
                set_size(0, *SIZE)
            else:
                os.setsid()
                for fd, target in ((os.open("/dev/null", os.O_RDONLY), 0), (theirs, 1), (theirs, 2)):
                    os.dup2(fd, target)
            _as_child(lambda: self._be_wrapper(argv, environ))
        if not interactive:
            os.close(theirs)
        self.screen = Screen(ours)

    def _be_wrapper(self, argv: tuple[str, ...], environ: dict[str, str]) -> int:
        owner = self.owner
        os.closerange(3, 256)
        os.initgroups(owner.pw_name, owner.pw_gid)
        os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
        os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)
        os.chdir(owner.pw_dir)
        os.environ.clear()
        os.environ.update(
            HOME=owner.pw_dir, USER=owner.pw_name, PATH="/usr/bin:/bin", PBS_JOBID=self.job_id,
            TERM="xterm-256color", COLORTERM="truecolor", **environ,
        )  # fmt: skip
        wrapper.load_config = lambda _: self.node.config  # type: ignore[attr-defined]
        return wrapper.main(argv or ("-c", str(self.directory / "job")))

    def resize(self, text: str) -> None:
        """Write the file that `vsub` writes when its terminal changes."""
        temporary = self.directory / ".winsize"
        temporary.write_text(text)
        temporary.rename(self.directory / "winsize")

    def ended(self) -> tuple[int, str]:
        """The wrapper's exit status, and all that it has still said."""
        said = self.screen.rest()
        pid, self.wrapper = self.wrapper, 0
        return self._wait(pid, lambda: os.kill(pid, signal.SIGKILL)), said

    def children(self, name: str) -> list[int]:
        """The processes called `name` that the wrapper has started."""
        with suppress(OSError):
            listed = Path(f"/proc/{self.wrapper}/task/{self.wrapper}/children").read_text().split()
            return [int(pid) for pid in listed if Path(f"/proc/{pid}/comm").read_text().strip() == name]
        return []


class Jobs:
    """A node with an owner of jobs; `settings` are further sections of its configuration."""

    def __init__(self, base: Path, owner: pwd.struct_passwd, **settings: dict[str, object]) -> None:
        self.owner = owner
        shutil.copytree(TEMPLATES, base / "templates")
        self.node = make_node(
            base,
            images={"pool": str(POOL)},
            hypervisor={"allow_emulation": True, "overcommit_cpus": True},
            policy={"ram": {"min": "192M"}, **settings.pop("policy", {})},
            timeouts={"boot": 200},
            **settings,
        )
        record.make_folder(self.node.config.paths.run, 0o755)

    def submit(self, script: Optional[str] = None, **fields: Any) -> SpecPath:
        """A job directory as `vsub` writes it; `vm_prologue` and `vm_epilogue` are the texts of scripts."""
        owner = self.owner
        ruid = secrets.token_hex(8)
        outer = Path(owner.pw_dir, ".vtorque", ruid)
        outer.mkdir(parents=True, mode=0o700)
        make_key(outer / "key")
        files = {"script": script, **{name: fields.pop(name, None) for name in ("vm_prologue", "vm_epilogue")}}
        spec = a_spec(
            ruid=ruid,
            groups=fields.pop("groups", (GuestGroup("micro", 1, 1, 256),)),
            workdir=owner.pw_dir,
            ssh_public_key=" ".join((outer / "key.pub").read_text().split()[:2]),
            **{name: None if text is None else spec_hash(text.encode()) for name, text in files.items()},
            **fields,
        )
        data = dump_spec(spec)
        path = SpecPath(owner.pw_dir, ruid, spec_hash(data))
        directory = Path(path.directory)
        directory.mkdir(mode=0o700)
        (outer / "key").rename(directory / "key")
        (directory / "spec.json").write_bytes(data)
        job = f"#!/bin/sh\nexec '/opt/vtorque/libexec/vtorque-job' '{directory}' \"$@\"\n"
        for name, text in {**files, "job": job}.items():
            if text is not None:
                (directory / name).write_text(text)
                (directory / name).chmod(0o700)
        for made in (outer.parent, outer, directory, *directory.iterdir()):
            os.chown(made, owner.pw_uid, owner.pw_gid)
        return path

    def job(self, path: SpecPath, job_id: str = "12.host", **facts: Any) -> Job:
        return Job(self.node, self.owner, path, job_id, **facts)
