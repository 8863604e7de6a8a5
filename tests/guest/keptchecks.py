"""A session that outlives its connection, in a guest of any family."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path

from guestmachine import Machine, decode

WRITER = """#!/bin/bash
cd /tmp
n=0
while [ ! -e /tmp/enough ]; do
    n=$((n + 1))
    printf '%07d\\n' $n
    printf '\\0\\377%07d' $n >&2
done
echo $n >/tmp/count
exit 9
"""


def session_outlives_its_connection(guest: Machine, file: str, home: Path) -> None:
    """Runs WRITER, as `file` describes it, with the home at `home` here.

    Detached, its shares can be let go of; attached again, by whatever connection, it goes on.
    """
    status = f"{guest.setup.user.home}/ended"
    out = err = b""

    def start(words: str) -> subprocess.Popen[bytes]:
        command = guest.ssh_command(f"exec /run/vtorque/run {words} {status}")
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    job = start(f"-k {file}")
    for number in range(3):
        token = b"%064x" % (0xABCDEF << number)
        time.sleep(1)
        said, aside, left = detached(job, token)
        assert left == token + b"l" and job.returncode == 0
        out, err = out + said, err + aside
        guest.send("quiesce")
        event = guest.wait_for("quiesce")
        assert event["status"] == 0, decode(event["output"])
        guest.send("mount")
        assert guest.wait_for("mount")["status"] == 0
        job = start("-a")
        assert job.stdin is not None
        job.stdin.write(b"ATTACH\n")
        job.stdin.flush()
    time.sleep(1)
    assert guest.ssh("touch /tmp/enough").returncode == 0
    said, aside = job.communicate(timeout=60)
    assert job.returncode == 9 and (home / "ended").read_text() == "9\n"
    count = int(guest.ssh("cat /tmp/count; rm /tmp/count /tmp/enough").stdout)
    same = out + said == b"".join(b"%07d\n" % n for n in range(1, count + 1))
    assert same, f"{len(out)} bytes and {len(said)} are not {count} lines"
    assert err + aside == b"".join(b"\0\xff%07d" % n for n in range(1, count + 1)), "standard error"
    assert (
        guest.ssh(
            "ls /run/vtorque/session; ls -d /tmp/vtorque.*; grep -l '[v]torque/run.-' /proc/[0-9]*/cmdline"
        ).stdout
        == ""
    )
    again = guest.ssh(f"/run/vtorque/run -a {status}")
    assert again.returncode == 70 and "not there any more" in again.stderr


def detached(job: subprocess.Popen[bytes], token: bytes) -> tuple[bytes, bytes, bytes]:
    """What a job has said on both streams until it was stopped, and what came after that on the first."""
    assert job.stdin is not None and job.stdout is not None and job.stderr is not None
    streams = (job.stdout, job.stderr)
    job.stdin.write(b"DETACH %s\n" % token)
    job.stdin.flush()
    said = dict.fromkeys(streams, b"")
    while waiting := [stream for stream in streams if token + b"y" not in said[stream]]:
        ready, _, _ = select.select(waiting, [], [], 60)
        assert ready, said
        for stream in ready:
            said[stream] += os.read(stream.fileno(), 1 << 16)
    job.stdin.write(b"LEAVE %s\n" % token)
    job.stdin.flush()
    rest = job.stdout.read()
    assert job.stderr.read() == b"" and job.wait(timeout=60) == 0
    job.stdin.close()
    for stream in streams:
        stream.close()
    (out, behind), (err, nothing) = (said[stream].split(token + b"y") for stream in streams)
    assert nothing == b""
    return out, err, behind + rest
