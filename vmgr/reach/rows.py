"""From what agents say to one row for each guest. Pure functions; what is missing or strange is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from vmgr.reach.agents import members

if TYPE_CHECKING:
    from vmgr.suspended.listing import Stored

OWN_STATES = ("off", "booting")
"""What a guest can be by itself while its job is ready or running."""


class GuestRow(NamedTuple):
    """One guest. Times are in seconds: `age_s` since its job's start on the node, `cpu_s` of its QEMU's CPU time.

    `rank`, `guest` (its name), `mac` and `port` (of the node's 127.0.0.1, to its SSH) are None until they are known.
    """

    job: str
    rank: Optional[int]
    node: str
    user: str
    guest: Optional[str]
    image: str
    vcpus: Optional[int]
    ram_mib: Optional[int]
    state: str
    age_s: Optional[float]
    cpu_s: Optional[float]
    address: Optional[str]
    mac: Optional[str]
    port: Optional[int]
    reason: str

    @property
    def cpu_percent(self) -> Optional[float]:
        """CPU time as a share of one CPU since the start of the job on the node; None before the guest runs."""
        return None if not self.age_s or self.cpu_s is None else 100 * self.cpu_s / self.age_s


def guest_rows(snapshots: Iterable[Mapping[str, Any]]) -> list[GuestRow]:
    """The guests that snapshots tell of, by job, rank and node.

    Only the mother superior knows that the job runs: guests of other nodes, which are ready, run with it.
    """
    rows = [row for snapshot in snapshots for row in _rows(snapshot)]
    running = {row.job for row in rows if row.state == "running"}
    return _sorted(
        row._replace(state="running") if row.state == "ready" and row.job in running else row for row in rows
    )


def with_suspended(rows: list[GuestRow], stored: Iterable[Stored]) -> list[GuestRow]:
    """The rows, and one for each suspended job that has no guest among them: it is on no node, and has no age.

    Its reason is why it did not go on the last time, if that was tried.
    """
    known = {row.job for row in rows}
    more = [
        GuestRow(
            job=each.job_id, rank=None, node="-", user=each.user, guest=None, image=each.entry.image, vcpus=None,
            ram_mib=None, state="suspended", age_s=None, cpu_s=None, address=None, mac=None, port=None,
            reason=each.reason,
        )
        for each in stored
        if each.entry is not None and each.job_id not in known
    ]  # fmt: skip
    return _sorted([*rows, *more])


def _sorted(rows: Iterable[GuestRow]) -> list[GuestRow]:
    return sorted(rows, key=lambda row: (_number(row.job), row.job, -1 if row.rank is None else row.rank, row.node))


def _rows(snapshot: Mapping[str, Any]) -> list[GuestRow]:
    spec = snapshot.get("spec")
    groups = spec.get("groups") if isinstance(spec, Mapping) else None
    group = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) else {}
    common = GuestRow(
        job=_text(snapshot.get("job_id")) or "?",
        rank=None,
        node=_text(snapshot.get("node")) or "?",
        user=_text(snapshot.get("user")) or "?",
        guest=_text(snapshot.get("guest")),
        image=_text(snapshot.get("image")) or _text(group.get("image")) or "-",
        vcpus=_whole(group.get("vcpus")),
        ram_mib=_whole(group.get("ram_mib")),
        state=_text(snapshot.get("state")) or "?",
        age_s=_seconds(snapshot.get("age_s")),
        cpu_s=None,
        address=None,
        mac=None,
        port=None,
        reason=": ".join(filter(None, map(_text, (snapshot.get("code"), snapshot.get("reason"))))),
    )
    known = members(dict(snapshot))
    if not known:
        return [common]
    return [
        common._replace(
            rank=member["rank"],
            guest=member["name"],
            state=_state(common.state, member.get("power")),
            cpu_s=_seconds(member.get("cpu_s")),
            address=_text(member.get("address")),
            mac=_text(member.get("mac")),
            port=_whole(member.get("port")),
        )
        for member in known
    ]


def _state(job: str, power: object) -> str:
    return str(power) if power in OWN_STATES and job in ("ready", "running") else job


def _number(job: str) -> int:
    head = "".join(c if c.isascii() and c.isdigit() else " " for c in job[:20]).split(" ")[0]
    return int(head) if head else 0


def _text(value: object) -> Optional[str]:
    return value if isinstance(value, str) and value else None


def _whole(value: object) -> Optional[int]:
    return value if type(value) is int else None


def _seconds(value: object) -> Optional[float]:
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12 else None
    )
