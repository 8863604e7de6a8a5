"""`vmgr ps`: the guests of this node."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Optional

import click

from vmgr.commands.table import print_rows
from vmgr.config import load_config
from vmgr.errors import VTorqueError
from vmgr.node.client import AgentLink
from vmgr.paths import installation

ANSWER_SECONDS = 3.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def ps(as_json: bool) -> None:
    """List the guests of this node: all of them for root, one's own for a user.

    Example: vmgr ps
    """
    run = load_config(installation()).paths.run
    rows = []
    for snapshot in asyncio.run(_ask_all(sorted((run / "jobs").glob("*/*.sock")))):
        group = snapshot.get("spec", {}).get("groups", [{}])[0]
        rows.append((
            snapshot["job_id"], snapshot["guest"], group.get("image", "-"), group.get("vcpus", "-"),
            group.get("ram_mib", "-"), snapshot["state"], snapshot["reason"] or "",
        ))  # fmt: skip
    print_rows(("job", "guest", "image", "vcpus", "ram_mib", "state", "reason"), rows, as_json=as_json)


async def _ask_all(sockets: list[Path]) -> list[dict[str, Any]]:
    answers = await asyncio.gather(*(_ask(socket) for socket in sockets))
    return [answer for answer in answers if answer is not None]


async def _ask(socket: Path) -> Optional[dict[str, Any]]:
    """The state of one guest; None when its agent is gone, does not answer, or serves another user's job."""
    try:
        link = await AgentLink.connect(socket)
        link.send("status")
        answer = await asyncio.wait_for(link.snapshot(), ANSWER_SECONDS)
        link.close()
        return answer
    except (OSError, VTorqueError, asyncio.TimeoutError):
        return None
