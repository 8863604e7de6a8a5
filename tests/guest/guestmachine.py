"""A guest for tests: QEMU as the node agent starts it, with a seed, an event port, shares and a console."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fileservers import FileServers
from ports import free_port
from screen import Screen, set_size

from vmgr.config import Mount as NodeMount
from vmgr.config import Software
from vmgr.images.pool import Image
from vmgr.node.network.plan import GuestNet
from vmgr.node.qemu import share_arguments
from vmgr.node.seed import SeedPlan, seed_files, write_seed
from vmgr.node.user import User as NodeUser

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = REPOSITORY / "templates"
QEMU_MAC = "52:54:00:12:34:56"
SLOW = 4 if os.environ.get("VTORQUE_SLOW_MACHINE") else 1
BOOT_TIMEOUT_S = 240 * SLOW


@dataclass(frozen=True)
class User:
    """The job's user; the account need not exist on this machine."""

    name: str = "ada"
    uid: int = 12345
    gid: int = 12346
    group: str = "lovelace"
    shell: str = "/bin/bash"
    groups: tuple[tuple[str, int], ...] = (("lovelace", 12346), ("engines", 12399), ("users", 100))

    @property
    def home(self) -> str:
        return f"/home/{self.name}"


@dataclass(frozen=True)
class Mount:
    """A share; `source` is a folder, for kind nfs the text SERVER:/PATH."""

    tag: str
    target: str
    source: Path
    readonly: bool = False
    kind: str = "9p"
    security: Optional[str] = None


@dataclass
class Setup:
    """What a test guest is made of."""

    image: Image
    directory: Path
    user: User = field(default_factory=User)
    mounts: Sequence[Mount] = ()
    prologue: Optional[str] = None
    epilogue: Optional[str] = None
    environment: Mapping[str, str] = field(default_factory=dict)
    vcpus: int = 1
    ram_mib: int = 0
    hostname: str = "guest-1"
    cmdline: str = ""
    own_disk: bool = False
    seed: bool = True
    absent_shares: bool = False
    by_cloud_init: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    software: Software = field(default_factory=Software)
    network: GuestNet = field(default_factory=lambda: GuestNet(QEMU_MAC))
    hosts: tuple[tuple[str, str], ...] = ()
    slots: tuple[tuple[str, int], ...] = ()
    wait_hosts: bool = False
    devices: Sequence[str] = ()
    data: Optional[Path] = None
    virtiofsd: str = "/usr/lib/qemu/virtiofsd"

    @property
    def node_user(self) -> NodeUser:
        """The user as the node knows it."""
        user = self.user
        return NodeUser(user.name, user.uid, user.gid, user.group, user.home, user.shell, user.groups)

    @property
    def node_mounts(self) -> tuple[NodeMount, ...]:
        """The shares as the node's configuration has them."""
        return tuple(NodeMount(m.tag, m.kind, str(m.source), m.target, m.readonly, m.security) for m in self.mounts)

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key"


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)


def sign(setup: Setup, authority: Path) -> None:
    """Give the guest a host certificate for its name, signed with the private key `authority`."""
    subprocess.run(
        [
            "ssh-keygen", "-q",
            "-s", str(authority),
            "-I", setup.hostname,
            "-h",
            "-n", setup.hostname,
            str(setup.host_key.with_suffix(".pub")),
        ],
        check=True,
    )  # fmt: skip


def make_seed(setup: Setup) -> Path:
    """Write the NoCloud seed of the guest, as the node does, and return its path."""
    cert = setup.host_key.with_name("host_key-cert.pub")
    plan = SeedPlan(
        instance=f"test-{setup.hostname}",
        hostname=setup.hostname,
        family=setup.image.family,
        user=setup.node_user,
        ssh_public_key=setup.key.with_suffix(".pub").read_text().strip(),
        host_key=setup.host_key.read_text(),
        host_key_pub=setup.host_key.with_suffix(".pub").read_text().strip(),
        mounts=setup.node_mounts,
        network=setup.network,
        hosts=setup.hosts or (("10.0.2.15", setup.hostname),),
        slots=setup.slots or ((setup.hostname, setup.vcpus),),
        environment=setup.environment,
        metadata=setup.metadata,
        software=setup.software,
        user_key=setup.key.read_text(),
        host_cert=cert.read_text() if cert.exists() else None,
        wait_hosts=setup.wait_hosts,
        data=setup.data is not None,
    )
    hooks = {"prologue": setup.prologue, "epilogue": setup.epilogue}
    files = seed_files(plan, TEMPLATES, {name: text.encode() for name, text in hooks.items() if text is not None})
    if setup.by_cloud_init:
        for name in ("user-data", "network-config"):
            files[name] = files[name].replace(b"# vtorque: guest program only\n", b"")
    path = setup.directory / "seed.iso"
    write_seed(files, path)
    path.chmod(0o444)
    return path


class Machine:
    """A running guest. Use it as a context manager: leaving it proves that QEMU is gone."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.directory = setup.directory
        self.console = setup.directory / "console.log"
        self.started = 0.0
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._port = free_port()
        self._stream: Optional[io.TextIOWrapper] = None
        self._connection: Optional[socket.socket] = None
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.servers: Optional[FileServers] = None

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        setup = self.setup
        listener = socket.socket(socket.AF_UNIX)
        address = self.directory / "events.sock"
        listener.bind(str(address))
        listener.listen(1)
        user = setup.user
        self.directory.chmod(0o755)
        for path in (self.directory, address):
            if os.geteuid() == 0:
                os.chown(path, user.uid, user.gid)
        if any(mount.kind == "virtiofs" for mount in setup.mounts):
            place = self.directory / "place"
            place.mkdir(mode=0o700)
            self.servers = FileServers(setup.node_mounts, setup.node_user, place, setup.virtiofsd)
        command = self._command(address)
        (self.directory / "command.txt").write_text("\n".join(command))
        as_user: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": setup.node_user.gids}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "qemu.err").open("wb"),
            pass_fds=[fd for fd in self._share_fds if fd is not None],
            **(as_user if os.geteuid() == 0 else {}),
        )
        if self.servers is not None:
            self.servers.let_go()
        listener.settimeout(20)
        self._connection, _ = listener.accept()
        listener.close()
        self._connection.settimeout(BOOT_TIMEOUT_S)
        self._stream = self._connection.makefile("r", encoding="utf-8", errors="replace")

    def __exit__(self, *_exc: object) -> None:
        if self._connection is not None:
            self._connection.close()
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(timeout=20)
            assert not Path(f"/proc/{self.process.pid}").exists()
        if self.servers is not None:
            self.servers.close()

    @property
    def _share_fds(self) -> tuple[Optional[int], ...]:
        return () if self.servers is None else self.servers.fds

    def _command(self, events: Path) -> list[str]:
        setup, image = self.setup, self.setup.image
        ram_mib = setup.ram_mib or max(512, image.min_ram_mib)
        command = [
            "qemu-system-x86_64",
            "-nodefaults", "-no-user-config", "-no-reboot",
            "-machine", "q35",
            "-accel", "tcg,thread=multi",
            "-cpu", "max",
            "-smp", str(setup.vcpus),
            "-m", str(ram_mib),
            "-display", "none",
            "-chardev", f"file,id=console,path={self.console}",
            "-serial", "chardev:console",
            "-device", "virtio-rng-pci",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self._port}-:22",
            "-device", f"virtio-net-pci,netdev=net,mac={QEMU_MAC},romfile=",
            *setup.devices,
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=events,path={events}",
            "-device", "virtserialport,chardev=events,name=org.vtorque.0",
        ]  # fmt: skip
        if not setup.own_disk:
            command += [
                "-kernel", str(image.path("kernel")),
                "-initrd", str(image.path("initrd")),
                "-append", f"{image.cmdline} {setup.cmdline}".strip(),
            ]  # fmt: skip
        if image.disk:
            overlay = self.directory / "overlay.qcow2"
            subprocess.run(
                [
                    "qemu-img", "create", "-q",
                    "-f", "qcow2",
                    "-F", image.disk_format,
                    "-b", str(image.path("disk")),
                    str(overlay),
                ],
                check=True,
            )  # fmt: skip
            if os.geteuid() == 0:
                os.chown(overlay, setup.user.uid, setup.user.gid)
            command += [
                "-blockdev",
                f"driver=qcow2,node-name=root,file.driver=file,file.filename={overlay},file.cache.no-flush=on",
                "-device", "virtio-blk-pci,drive=root,serial=vtorque-root",
            ]  # fmt: skip
        if setup.data is not None:
            command += [
                "-blockdev", f"driver=file,node-name=data-file,filename={setup.data},locking=off",
                "-blockdev", "driver=raw,node-name=data,file=data-file,discard=unmap",
                "-device", "virtio-blk-pci,drive=data,serial=vtorque-data,werror=report",
            ]  # fmt: skip
        if setup.seed:
            command += [
                "-blockdev",
                f"driver=raw,node-name=seed,read-only=on,file.driver=file,file.filename={make_seed(setup)}",
                "-device", "virtio-blk-pci,drive=seed",
            ]  # fmt: skip
        if self.servers is not None:
            memory = f"memory-backend-memfd,id=memory,size={ram_mib}M,share=on"
            command += ["-object", memory, "-numa", "node,memdev=memory"]
        if not setup.absent_shares:
            command += share_arguments(setup.node_mounts, self._share_fds)
        return command

    # --- events ---

    def next_event(self) -> dict[str, Any]:
        """The next event of the guest; an empty one when the port has been closed."""
        assert self._stream is not None
        line = self._stream.readline()
        event: dict[str, Any] = json.loads(line) if line else {}
        if event:
            assert event["v"] == 1
            self.events.append((time.monotonic() - self.started, event))
        return event

    def wait_for(self, name: str) -> dict[str, Any]:
        """Read events until `name`, which is returned; fails with the console's end if it does not come."""
        while True:
            try:
                event = self.next_event()
            except TimeoutError:
                event = {}
            if event.get("event") == name:
                return event
            if not event or event["event"] == "failed":
                reason = decode(event.get("reason", ""))
                raise AssertionError(f"no {name} event {reason} {self._end()}\n{self.console_text()[-3000:]}")

    def _end(self) -> str:
        """How QEMU ended, if it has."""
        assert self.process is not None
        if self.process.poll() is None:
            return "(QEMU is running)"
        return (
            f"(QEMU ended with {self.process.returncode}: {(self.directory / 'qemu.err').read_text(errors='replace')})"
        )

    def send(self, op: str, **members: str) -> None:
        assert self._connection is not None
        self._connection.sendall(json.dumps({"v": 1, "op": op, **members}).encode() + b"\n")

    def ended(self, timeout_s: float = 60) -> bool:
        assert self.process is not None
        try:
            return self.process.wait(timeout=timeout_s * SLOW) == 0
        except subprocess.TimeoutExpired:
            return False

    def console_text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def wait_for_console(self, pattern: str, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Seconds from the start until the console matches `pattern` (polled: QEMU tells nobody of its writes)."""
        assert self.process is not None
        while time.monotonic() - self.started < timeout_s:
            if re.search(pattern, self.console_text()):
                return time.monotonic() - self.started
            assert self.process.poll() is None, self.console_text()[-3000:]
            time.sleep(0.05)
        raise AssertionError(f"the console never showed {pattern!r}:\n{self.console_text()[-3000:]}")

    # --- ssh ---

    def ssh_command(self, *command: str) -> list[str]:
        known = self.directory / "known_hosts"
        host_key = " ".join(self.setup.host_key.with_suffix(".pub").read_text().split()[:2])
        known.write_text(f"[127.0.0.1]:{self._port} {host_key}\n")
        return [
            "ssh",
            "-F", "none",
            "-T",
            "-i", str(self.setup.key),
            "-p", str(self._port),
            "-o", "BatchMode=yes",
            "-o", "IdentitiesOnly=yes",
            "-o", "StrictHostKeyChecking=yes",
            "-o", f"UserKnownHostsFile={known}",
            f"{self.setup.user.name}@127.0.0.1",
            *command,
        ]  # fmt: skip

    def ssh(self, command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            self.ssh_command(command),
            capture_output=True,
            text=True,
            timeout=120 * SLOW,
            check=False,
            **options,
        )

    def start_job(self, file: str) -> subprocess.Popen[str]:
        """Run the job described by `file` (a path in the guest); standard input is the control channel."""
        return subprocess.Popen(
            self.ssh_command(f"/run/vtorque/run {shlex.quote(file)}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_on_terminal(self, file: str, status: str) -> tuple[int, Screen]:
        """Run the interactive job described by `file` on a terminal of 40 by 100; gives the pid of ssh."""
        command = self.ssh_command(f"exec /run/vtorque/run -i {shlex.quote(file)} {shlex.quote(status)}")
        command[command.index("-T")] = "-tt"
        pid, fd = pty.fork()
        if pid == 0:
            set_size(0, 40, 100)
            os.environ["TERM"] = "xterm"
            os.execvp(command[0], [*command[:1], "-o", "EscapeChar=none", "-o", "LogLevel=ERROR", *command[1:]])
        return pid, Screen(fd)


def decode(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")
