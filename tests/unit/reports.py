"""Reports of jobs as agents write them: of one node, of two with guests each, hostile ones."""

from __future__ import annotations

import json
from typing import Any, Optional

from vmgr.report.parts import Part, read_parts

HOSTILE = [
    "<script>document.title='owned'</script>", "\"><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}",
    "</svg></style><h1>owned</h1>", "&lt;b&gt;", "\x1b[2J\u202eevil", "a" * 300, "javascript:alert(1)", "]]>-->",
]  # fmt: skip
BEGAN = 1_764_300_000.25


def moment(name: str, t: float, start: Optional[float] = None) -> dict[str, Any]:
    return {"name": name, "t": t} if start is None else {"name": name, "start": start, "t": t}


def a_guest(name: str, rank: int, *, late: float = 0.0, cloud_init: bool = False) -> dict[str, Any]:
    """A guest whose boot took `late` seconds longer than that of the quickest."""
    moments = [
        moment("launched", 0.42), moment("started", 0.61), moment("booted", 4.9 + late),
        moment("uptime", 4.9 + late, 0.95), moment("prologue", 5.6 + late), moment("ready", 6.3 + late),
        moment("uptime", 6.4 + late, 0.98), moment("kernel", 2.7 + late, 0.98),
    ]  # fmt: skip
    if cloud_init:
        moments += [moment("cloud-init init-local", 4.1 + late, 3.2), moment("cloud-init init", 6.0 + late, 5.1 + late)]
    return {"name": name, "rank": rank, "moments": [*moments, moment("epilogue", 21.4 + late)]}


def an_attempt(node: str = "n1", index: int = 0, **fields: Any) -> dict[str, Any]:
    """One node's part of a job of two nodes that went well, with two guests."""
    stages = [
        ("agent", 0.05), ("spec", 0.11), ("staged", 0.38), ("launched", 0.5), ("pinned and running", 0.62),
        ("booted", 5.5), ("prologue", 6.2), ("guests ready", 6.9), ("ready", 7.6), ("job ended", 20.9),
        ("epilogue", 21.9), ("gone", 22.4),
    ]  # fmt: skip
    if index == 0:
        stages.insert(-3, ("job started", 7.9))
    return {
        "user": "alice", "key": "0123456789abcdef", "job_id": "12.host", "attempt": "1", "node": node,
        "node_index": index, "nodes": ["n1"] if index else ["n1", "n2"], "image": "debian-12@3", "vcpus": 2,
        "ram_mib": 1024, "state": "ended", "code": None, "reason": None,
        "job_status": None if index else 0, "stages": [moment(name, t) for name, t in stages],
        "guests": [
            a_guest(f"v{node}-1", 2 * index, cloud_init=True), a_guest(f"v{node}-2", 2 * index + 1, late=0.6),
        ],
        "began": BEGAN + 0.04 * index, "reader": 1000, **fields,
    }  # fmt: skip


def until(attempt: dict[str, Any], t: float, **fields: Any) -> dict[str, Any]:
    """The same attempt when only `t` seconds of it have passed."""
    cut = {**attempt, "job_status": None, **fields}
    cut["stages"] = [stage for stage in attempt["stages"] if stage["t"] <= t]
    cut["guests"] = [
        {**guest, "moments": [each for each in guest["moments"] if each["t"] <= t]} for guest in attempt["guests"]
    ]
    return cut


def failed() -> list[dict[str, Any]]:
    """Two nodes; the second has failed while its guests booted."""
    lead = until(an_attempt(), 6.95, state="failed", code="VT-BOOT", reason="node n2: the guest vn2-1 was not ready")
    lead["stages"] += [moment("failed", 12.1), moment("gone", 13.0)]
    sister = until(an_attempt("n2", 1), 3.0, state="failed", code="VT-BOOT", reason="the guest vn2-1 was not ready")
    sister["stages"] += [moment("failed", 12.0), moment("gone", 12.6)]
    return [lead, sister]


def hostile() -> list[dict[str, Any]]:
    """A job all of whose names are hostile."""
    guests = [{**a_guest(name, rank), "name": name} for rank, name in enumerate(HOSTILE)]
    for guest in guests:
        guest["moments"].append(moment(guest["name"], 6.2, 5.0))
    names = {"node": HOSTILE[0], "user": HOSTILE[1], "image": HOSTILE[2], "job_id": HOSTILE[3], "state": HOSTILE[4]}
    return [an_attempt(guests=guests, code=HOSTILE[1], reason=" ".join(HOSTILE), **names)]


def file_of(*attempts: dict[str, Any]) -> bytes:
    return json.dumps({"v": 1, "attempts": list(attempts)}).encode()


def parts_of(*attempts: dict[str, Any], alive: bool = False) -> list[Part]:
    """What each of several nodes says of one attempt."""
    told = [read_parts(json.dumps({"v": 1, "alive": alive, "attempts": [attempt]}).encode()) for attempt in attempts]
    return [part for parts in told for part in parts]
