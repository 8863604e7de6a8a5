"""The guest's job runner on this machine, under any shell, and an `ssh` that leads to it."""

from __future__ import annotations

import asyncio
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Optional

import psutil
import pytest

from vmgr.node import kept, session
from vmgr.node.kept import KeptSession

RUNNER = Path(__file__).parents[2] / "templates" / "guest" / "common" / "run"
SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]

SSH = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(
    [PROGRAM, "-c", sys.argv[-1]], stdin=-1, stdout=-1, stderr=-1, start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
)
def copy(source, target, close):
    try:
        while data := os.read(source, 16384):
            while data:
                data = data[os.write(target, data):]
    except OSError:
        os.close(source)
    if close:
        os.close(target)
out, err = (os.dup(pipe.fileno()) for pipe in (child.stdout, child.stderr))
child.stdout.close(), child.stderr.close()
into = os.dup(child.stdin.fileno())
child.stdin.close()
threading.Thread(target=copy, args=(0, into, True), daemon=True).start()
copies = [threading.Thread(target=copy, args=(*ends, False), daemon=True) for ends in ((out, 1), (err, 2))]
for each in copies:
    each.start()
for each in copies:
    each.join()
os._exit(status if (status := child.wait()) >= 0 else 255)
"""
"""The way of ssh and sshd together: what runs at its other end lives on when it is killed, and reads an end."""


class Site:
    """A directory that is the job's and the guest's /run/vtorque at once."""

    def __init__(self, base: Path, shell: str) -> None:
        self.base = base
        self.session = base / "session"
        self.session.mkdir(mode=0o700)
        self.program = base / "sh"
        self.program.symlink_to(shutil.which(shell) or shell)
        if shell == "busybox":
            self.program.rename(base / "ash")
            self.program = base / "ash"
        text = RUNNER.read_text().replace("/run/vtorque/", f"{base}/").replace("/bin/sh", str(self.program))
        text = text.replace("/tmp/vtorque.", f"{base}/place.").replace("sleep 5 ", "sleep 0.5 ")
        (base / "env").touch()
        self.write("run", text)
        self.write("bin/ssh", f"#!{sys.executable} -IS\nPROGRAM = {str(self.program)!r}\n{SSH}")
        self.lost: list[OSError] = []

    def lead_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on sessions in a guest are in this one."""
        monkeypatch.setattr(kept, "RUNNER", str(self.base / "run"))
        monkeypatch.setattr(session, "RUNNER", str(self.base / "run"))
        monkeypatch.setenv("PATH", f"{self.base}/bin", prepend=":")
        home = self.base / "home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))

    async def nothing_is_left(self) -> None:
        while self.left():
            await asyncio.sleep(0.05)

    def write(self, name: str, text: str) -> Path:
        path = self.base / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def open(self, tag: str = "t") -> KeptSession:
        return KeptSession(self.base, tag, "vn1-1", 22, "ssh-ed25519 AAAA x", self.lost.append)

    def run(self, way: KeptSession, script: str, settings: str = "") -> asyncio.Task[Optional[int]]:
        path = self.write("script", script)
        described = f"cd {self.base}\n{settings}VT_JOB_SHELL={shutil.which('bash')}\n"
        return asyncio.ensure_future(way.run_kept(described, path, "1 'b  c'"))

    def left(self) -> list[str]:
        """Processes, and files of sessions, that are still there."""
        files = [str(path) for path in (*self.session.iterdir(), *self.base.glob("place.*"))]
        return [" ".join(process.info["cmdline"]) for process in self.processes("")] + files

    def end(self) -> None:
        """Leave nothing of a session that nobody lets go on, or of a test that has failed."""
        for process in self.processes(""):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of this place with that in their command line: that names the place, or they are in it."""
        mine, found = str(self.base), []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words = " ".join(process.info["cmdline"] or [])
            if name in words and (mine in words or (process.info["cwd"] or "").startswith(mine)):
                found.append(process)
        return found
