"""The job of an attempt: read with its user's rights, and checked as if `vsub` had never seen it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Callable, NamedTuple, Optional

from vmgr.checks import check_spec
from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.jobspec import MAX_SPEC_BYTES, SpecPath, parse_spec
from vmgr.node import abilities, record
from vmgr.node.allocation import Allocation, find, given
from vmgr.node.guestjob import Job
from vmgr.node.hookcall import GroupPath
from vmgr.node.keys import MAX_KEY_BYTES
from vmgr.node.network.plan import plan_network
from vmgr.node.resuming import Ask, check_machines, resumed_network
from vmgr.node.user import User, primary_group
from vmgr.node.userio import read_file
from vmgr.node.workspace import job_names
from vmgr.policy import Subject


class Call(NamedTuple):
    """What the prologue hook wrote down about the attempt."""

    job_id: str
    user: str
    directory: SpecPath
    node_index: int
    queue: Optional[str]
    task_file: Optional[str] = None
    node_file: Optional[str] = None
    nodes: Optional[tuple[str, ...]] = None
    key: Optional[str] = None
    tag: Optional[str] = None
    groups: tuple[GroupPath, ...] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Call:
        """The call in a record: a `HookCall` of a guest job, as JSON keeps it."""
        nodes = facts["nodes"]
        found = {key: facts[key] for key in cls._fields}
        found.update(
            directory=SpecPath(*facts["directory"]),
            nodes=None if nodes is None else tuple(nodes),
            groups=tuple(GroupPath(*group) for group in facts["groups"]),
        )
        return cls(**found)


async def allocation_of(call: Call, attempt: str, *, timeout_s: float) -> Allocation:
    """The nodes of the attempt, told to its hook or found in what the batch system writes; `attempt` as in `find`.

    Raises VTorqueError (VT-NODE).
    """
    if call.nodes is not None and call.key is not None:
        return given(call.nodes, call.node_index, call.key)
    return await find(call.task_file, call.node_file, call.node_index, attempt, timeout_s=timeout_s)


async def checked_job(
    call: Call,
    config: Config,
    place: record.Place,
    user: User,
    allocation: Allocation,
    *,
    stored: Callable[[bool], None] = lambda is_stored: None,
) -> tuple[Job, Optional[int]]:
    """What the user asks for, and what holds its image, which the caller closes when no guest uses it any more.

    A suspended job goes on from what is stored of it; `stored` is told whether this is one, and before that it may be.
    Raises VTorqueError for what is not legal or cannot be.
    """
    directory, patience = call.directory, config.timeouts.user_file
    if directory.home != user.home:
        raise VTorqueError(f"{directory.home} is not the home of {user.name} ({user.home})", code=Code.SPEC)
    source = f"{directory.directory}/spec.json"
    data = await read_file(user, source, limit=MAX_SPEC_BYTES, timeout_s=patience)
    spec = parse_spec(data, sha256=directory.sha256, source=source)
    subject = Subject(user.name, primary_group(user), call.queue)
    nodes, group = len(allocation.nodes), spec.groups[0]
    ask, found = Ask(call.job_id, user.name, directory.sha256, group), None
    if spec.suspend:
        from vmgr.node.restoring import find_suspended  # few jobs can be

        stored(True)
        found = await find_suspended(config, user, ask, allocation, place)
    stored(found is not None or (spec.suspend and config.suspended.folder is None))  # nobody can look there now
    image_of_entry = None if found is None else found.entry.image
    with ExitStack() as failing:
        image, held = Pool(config.pool).hold(
            lambda: check_spec(spec, config, subject, source, nodes=nodes, stored=image_of_entry)
        )  # fmt: skip
        if image.is_own:
            from vmgr.node.ownimage import open_image  # few jobs have one

            image, held = await open_image(image, user, config)
        if held is not None:
            failing.callback(os.close, held)
        abilities.check(spec)
        network = plan_network(spec.network, call.job_id, allocation.nodes, group.per_node, config.network)
        if found is not None:
            network = resumed_network(network, found, ask)
            check_machines(
                found.parts[allocation.node_index], ask, disk_bytes=image.virtual_size if image.disk else None
            )
        key = None
        if len(network.members) > 1 and network.kind != "user":
            key = await read_file(user, f"{directory.directory}/key", limit=MAX_KEY_BYTES, timeout_s=patience)
        own_disk = held if image.is_own else None
        shares = [mount for mount in config.mounts if mount.name in spec.mounts]
        copies, path_key = spec.fs_type == "sharedfs", allocation.key if found is None else found.entry.key
        stands_for = job_names(config, shares, user, call.job_id, path_key, copies=copies)
        mounts = tuple((mount.as_saved() if spec.suspend else mount).filled(stands_for._asdict()) for mount in shares)
        job = Job(
            call.job_id, place, user, spec, image, allocation, network, mounts, stands_for, key, own_disk, found,
            call.groups,
        )  # fmt: skip
        failing.pop_all()
    return job, held
