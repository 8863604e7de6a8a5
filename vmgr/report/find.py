"""Where a job is or was: its whole id and its nodes, from what is kept here, its mother superior, the batch system."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import jobs_folder
from vmgr.reach.agents import job_here
from vmgr.reach.shell import is_here, run_on
from vmgr.reach.where import by_index, meant, nodes_of_job, server, whole_id
from vmgr.report.gather import found_here, gather
from vmgr.report.members import is_whole, noted, parse_named
from vmgr.report.parts import Part
from vmgr.report.timeline import newest

HINT = "name the job whole, such as 12.server, and with --node a node that it had"


class Found(NamedTuple):
    """A job: its whole id, its nodes with the mother superior first, and what is known of them so far.

    `asked` are nodes that have been asked for their part, `missing` those of them that gave none, and why.
    """

    job_id: str
    nodes: tuple[str, ...]
    parts: list[Part]
    asked: frozenset[str] = frozenset()
    missing: Mapping[str, str] = MappingProxyType({})

    @property
    def lead(self) -> Optional[Part]:
        """The part of the mother superior in the newest attempt, None where it is not known."""
        return next((part for part in newest(self.parts) if part.node_index == 0), None)

    def with_parts_of(self, nodes: Iterable[str], config: Config) -> Found:
        """The same with what these nodes say, as far as they are not this one and have not been asked."""
        fresh = [node for node in dict.fromkeys(nodes) if node not in self.asked and not is_here(node)]
        if not fresh:
            return self
        more = gather(self.job_id, fresh, run_on, timeout_s=config.timeouts.reach)
        return self._replace(
            parts=[*self.parts, *more.parts],
            asked=self.asked | set(fresh),
            missing={**self.missing, **more.missing},
        )


def find(config: Config, job: str, node: Optional[str] = None) -> Found:
    """What is known of a job on this node, on `node`, and on its mother superior.

    Raises VTorqueError when that is nothing: VT-VALUE, or what the batch system says.
    """
    job_id = whole(config, job)
    found = Found(job_id, (), found_here(config, job_id)).with_parts_of([node] if node else [], config)
    if by_index(config, job_id):  # the other node may have known better
        job_id = next((part.job_id for part in found.parts if is_whole(part.job_id)), job_id)
        found = found._replace(job_id=job_id)
    folder = jobs_folder(config.logging)
    known_here = bool(found.parts) or (folder is not None and os.access(folder / f"{job_id}.log", os.F_OK))
    if found.lead is None:  # a sister knows whose it is
        found = found.with_parts_of([part.nodes[0] for part in newest(found.parts)[:1] if part.nodes], config)
    if found.lead is None:
        found = _placed(config, found, known=known_here or node is not None)
        found = found.with_parts_of(found.nodes[:1], config)
    if found.lead is not None and found.lead.nodes:
        return found._replace(nodes=found.lead.nodes)
    nodes = found.nodes or tuple([node] if node else [os.uname().nodename] if known_here else [])
    if not nodes:
        raise VTorqueError(f"the nodes of job {found.job_id} are not known", code=Code.VALUE, hint=HINT)
    return found._replace(nodes=nodes)


def whole(config: Config, job: str) -> str:
    """The whole id of a job, which may be over; what was given where nobody here knows.

    Raises VTorqueError (VT-VALUE) for an array, where it is not a job of its own.
    """
    try:
        job = meant(config, job)
        return job_here(config.paths, job) or whole_id(config, job)
    except VTorqueError as err:
        if err.code is Code.VALUE:
            raise
        return _noted(config, job) or job


def _noted(config: Config, job: str) -> Optional[str]:
    """The whole id of a member of a job array that was on this node, and that the batch system has forgotten."""
    named, folder = parse_named(job), jobs_folder(config.logging)
    if named is None or folder is None:
        return None
    try:
        cluster = named.cluster or server(config)
    except VTorqueError:
        return None
    return noted(folder, named, cluster, os.geteuid() or None)


def _placed(config: Config, found: Found, *, known: bool) -> Found:
    """With the whole id and the nodes that the batch system knows; with `known` it need not know the job any more."""
    try:
        placed = nodes_of_job(config, found.job_id)
        return found._replace(job_id=placed.job_id, nodes=placed.nodes)
    except VTorqueError as err:
        if known:
            return found
        if err.code is Code.AGENT:
            raise VTorqueError(f"nothing is kept of job {found.job_id} here", code=Code.VALUE, hint=HINT) from err
        raise
