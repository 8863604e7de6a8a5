"""Root of a test's guest: a VM prologue that goes on to obey the user, who counts as root there anyway."""

from __future__ import annotations

from guestmachine import Machine

PROLOGUE = """#!/bin/sh
# runs the file whose name comes through a FIFO
mkfifo -m 0666 /run/root.in /run/root.out
while :; do
    read -r file </run/root.in
    { sh "$file" 2>&1; echo "status $?"; } >/run/root.out
done </dev/null >/dev/null 2>&1 &
"""


def run_as_root(machine: Machine, script: str) -> tuple[str, int]:
    """What a script of root's in the guest prints, errors as well, and its status."""
    done = machine.ssh(
        "cat >/tmp/script && echo /tmp/script >/run/root.in && cat /run/root.out", stdin=None, input=script
    )
    text, _, status = done.stdout.rpartition("status ")
    assert status, done
    return text.strip(), int(status)
