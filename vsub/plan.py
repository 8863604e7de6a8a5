"""What a guest job comes to: everything that is asked for, read, held against policy and guests, and fitted.

Nothing is written here. Everything that can be refused has been when a plan exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from vmgr.checks import (
    Checker,
    Features,
    against_suspension,
    check_disk_of,
    check_metadata,
    check_shares,
    choose_image,
    guessed_family,
    guest_features,
    guest_group,
    suspendable,
    with_room,
)
from vmgr.config import Config, Mount, fill
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import MAX_ARGUMENTS, Pinning
from vmgr.names import QUEUES, is_queue
from vmgr.policy import Policy, Subject
from vmgr.request import Request
from vsub.account import Account
from vsub.array import array_indexes
from vsub.attributes import last_value, read_attributes
from vsub.engines import Engine
from vsub.fit import Fitted, fit
from vsub.honour import check_options, check_resources, check_staging, job_shell
from vsub.hostrequest import HostRequest
from vsub.options import ONE_SCRIPT, Line, Option, last
from vsub.resources import last_of, read_resources
from vsub.script import Script, as_job_script, read_user_file
from vsub.visible import below, is_visible, submission_directory

HOOKS = ("vm_prologue", "vm_epilogue")


class Plan(NamedTuple):
    """A guest job, checked.

    `options` are qsub's, directives first: the last one wins. `script` is None for an interactive job without a
    command. `own_prologue` is the path of the user's own `-l prologue=`. `request` is what the user asked of the
    guests, `policy` what held for it.
    """

    options: tuple[Option, ...]
    script: Optional[Script]
    job_name: str
    interactive: bool
    array: Optional[str]
    arguments: str
    shell: Optional[str]
    workdir: str
    own_prologue: Optional[str]
    request: Request
    policy: Policy
    features: Features
    pinning: Pinning
    metadata: Optional[dict[str, Any]]
    image: Image
    hooks: dict[str, bytes]
    fitted: Fitted

    def last(self, letter: str) -> Optional[Option]:
        """The option that counts where the last one wins."""
        return last(self.options, letter)


def make_plan(
    line: Line, directives: Line, script: Script, request: Request, account: Account, config: Config, engine: Engine
) -> Plan:
    """The plan of a guest job. Raises VTorqueError for everything that cannot be."""
    options = directives.options + line.options
    attributes = read_attributes(options)
    _check_usage(line, directives, options, engine)
    check_options(options, attributes, account.name, account.group)
    resources = last_of(read_resources(options))
    check_resources(resources)
    interactive = last(options, "I") is not None or any(attribute.letter == "I" for attribute in attributes)
    array = last_value(options, "t")
    _check_interactive(options, interactive, array and array[1])

    policy = config.policy_for(Subject(account.name, account.group, _queue(options, config)))
    request = _with_own_image(request)
    checker = Checker(config, policy, {key: asked.source for key, asked in request.items()})
    group = guest_group(request, checker)
    asked_of_nodes = engine.read_host_request(options)
    _check_queue(options)
    features = guest_features(request, checker, asked_of_nodes.nodes.number * group.per_node)
    stays = last(options, "r")
    against = against_suspension(
        features, group.image, interactive=interactive, rerunnable=stays is None or stays.value != "n"
    )
    asked = bool(request["suspend"].value) if "suspend" in request else None
    features = features._replace(suspend=suspendable(asked, against, checker))
    distro = _text(request, "distro")
    image = choose_image(group, distro, _text(request, "arch"), checker)
    guessed = guessed_family(image, distro, checker)
    check_disk_of(image, features.fs_type, checker)
    group = with_room(group, image, request, checker)
    check_shares(features.mounts, image, checker, suspend=features.suspend)
    _check_nodes(asked_of_nodes, policy)
    fitted = fit(group, features, asked_of_nodes, image, request, checker)
    mounts = _known_mounts(config, features.mounts, account)
    here = submission_directory()
    features = _with_own_disk(features, here)
    check_staging(attributes, mounts, account.home)
    prologue = resources.get("prologue")
    work_dir = last(options, "w")
    script, note = as_job_script(script)
    return Plan(
        options=options,
        script=None if interactive and last(options, "x") is None else script,
        job_name=script.job_name,
        interactive=interactive,
        array=None if array is None else array_indexes(*array),
        arguments=_arguments(None if interactive else last(options, "F")),
        shell=job_shell(last(options, "S")),
        workdir=_workdir(here, last(options, "d") or work_dir, mounts),
        own_prologue=prologue and below(below(here, work_dir.value or "") if work_dir else here, prologue.value),
        request=request,
        policy=policy,
        features=features,
        pinning=_pinning(features, fitted, request),
        metadata=_metadata(request, image, checker),
        image=image,
        hooks={key: read_user_file(str(request[key].value), key) for key in HOOKS if key in request},
        fitted=fitted._replace(notes=(*fitted.notes, *note, *([guessed] if guessed else []))),
    )


def _known_mounts(config: Config, names: tuple[str, ...], account: Account) -> tuple[Mount, ...]:
    """The shares of the guests whose folders can be told before the job has an id."""
    known = {"home": account.home, "user": account.name}
    if config.workspace.folder is not None:
        known["workspace"] = fill(config.workspace.folder, known)
    mounts = (mount.filled(known) for mount in config.mounts if mount.name in names)
    return tuple(mount for mount in mounts if mount.is_known)


def _with_own_image(request: Request) -> Request:
    """An image of the user's own, `./disk.qcow2`, by its whole path."""
    asked = request.get("img")
    value = str(asked.value) if asked else ""
    if asked is None or not value.startswith(("./", "../")):
        return request
    path = value[2:] if value.startswith("./") else value
    return {**request, "img": asked._replace(value=below(submission_directory(), path))}


def _with_own_disk(features: Features, here: str) -> Features:
    """A disk that the user has, by its whole path; everything else about it is for the node to see."""
    disk = features.disk
    if disk is None or disk.image is None:
        return features
    return features._replace(disk=disk._replace(image=below(here, disk.image)))


def _text(request: Request, key: str) -> Optional[str]:
    return str(request[key].value) if key in request else None


def _queue(options: tuple[Option, ...], config: Config) -> Optional[str]:
    option = last(options, "q")
    named = (option.value or "").partition("@")[0] if option else ""
    return named or config.submit.default_queue


def _check_queue(options: tuple[Option, ...]) -> None:
    """Refuse a queue whose jobs no hook would take. Raises VTorqueError (VT-OPTION)."""
    option = last(options, "q")
    named = (option.value or "").partition("@")[0] if option else ""
    if option and named and not is_queue(named):
        raise VTorqueError(
            f"{option} ({option.source}) names no queue that guest jobs can be in", code=Code.OPTION,
            hint=f"allowed are {QUEUES}",
        )  # fmt: skip


def _check_usage(line: Line, directives: Line, options: tuple[Option, ...], engine: Engine) -> None:
    """Refuse what the batch system would not understand. Raises VTorqueError (VT-USAGE)."""
    problem = line.problem or directives.problem
    if problem:
        raise VTorqueError(problem, code=Code.USAGE, hint=engine.usage)
    if len(line.operands) > 1:
        raise VTorqueError(
            f"one script can be submitted, not also {line.operands[1]!r}",
            code=Code.USAGE,
            hint=ONE_SCRIPT,
        )
    command = last(options, "x")
    if command is not None and not line.operands:
        raise VTorqueError(f"-x ({command.source}) names no script", code=Code.USAGE, hint="write vsub -I -x SCRIPT")


def _check_interactive(options: tuple[Option, ...], interactive: bool, array: Optional[Option]) -> None:
    command = last(options, "x")
    if command is not None and not interactive:
        raise VTorqueError(f"-x ({command.source}) goes with -I only", code=Code.USAGE, hint="add -I, or leave it out")
    if interactive and array is not None:
        raise VTorqueError(f"an interactive job cannot be a job array ({array})", code=Code.USAGE, hint="leave one out")


def _check_nodes(asked: HostRequest, policy: Policy) -> None:
    """Refuse more nodes than the policy has for a guest job."""
    bounds, count = policy.bounds("nodes"), asked.nodes.number
    side = bounds.broken_by(count)
    if side is not None:
        what = f"{asked.option} ({asked.option.source})" if asked.option else "the job"
        raise VTorqueError(
            f"{what} asks for {count} nodes with guests",
            code=Code.POLICY,
            hint=f"{bounds.min} to {bounds.max} is allowed ({policy.origin('nodes', side)})",
        )


def _arguments(option: Optional[Option]) -> str:
    """The text of `-F`. Raises VTorqueError (VT-VALUE) for one that is more than a line."""
    text = option.value or "" if option else ""
    if "\n" in text or len(text) > MAX_ARGUMENTS:
        raise VTorqueError(
            f"-F ({option.source if option else ''}) is not one line of up to {MAX_ARGUMENTS} characters",
            code=Code.VALUE,
            hint="put them into the script",
        )
    return text


def _workdir(here: str, option: Optional[Option], mounts: tuple[Mount, ...]) -> str:
    """The folder in which the job starts: `-d`, else `-w`, else where the user is; it must be in the guest too."""
    workdir = below(here, option.value or "") if option else here
    if not is_visible(workdir, mounts):
        shown = ", ".join(mount.target for mount in mounts if mount.source == mount.target)
        raise VTorqueError(
            f"the job's directory {workdir!r} ({option.source if option else 'where you are'}) is not visible "
            "in the guest",
            code=Code.WORKDIR,
            hint=f"visible: {shown or 'nothing'}; submit from there, or give -d",
        )
    return workdir


def _pinning(features: Features, fitted: Fitted, request: Request) -> Pinning:
    if features.pinning != "file":
        return Pinning(features.pinning, None)
    from vsub.userfiles import read_pinning  # YAML, which most jobs do not need

    asked = request["vcpu_pinning"]
    return read_pinning(str(asked.value), asked.source, fitted.group)


def _metadata(request: Request, image: Image, checker: Checker) -> Optional[dict[str, Any]]:
    if "metadata" not in request:
        return None
    from vsub.userfiles import read_metadata  # as above

    asked = request["metadata"]
    tree = read_metadata(str(asked.value), asked.source)
    check_metadata(tree, image, checker)
    return tree
