"""What a job asks for, held against the site's policy: by `vsub` before it submits, and again by root on the node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Optional

from vmgr.config import Config, Mount
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.jobspec import PINNINGS, Disk, GuestGroup, Iocm, Spec
from vmgr.policy import Policy, Subject, is_among
from vmgr.request import COMPONENTS, Request, Value, show
from vmgr.units import format_size_mib

BOUNDED = ("vcpus", "ram", "vms_per_node")
ARCHITECTURES = (("x86_64", "amd64"), ("aarch64", "arm64"), ("ppc64le", "ppc64el"))
DATA_FOLDER = "/data"
"""Where a guest has its persistent disk."""
IOCM_CORES = ("iocm_min_cores", "iocm_max_cores")


class Features(NamedTuple):
    """What is asked of the guests beside their number and size; the fields are those of the specification.

    `pinning` is one of PINNINGS, or `file` for a mapping of the user's own.
    """

    pinning: str
    fs_type: str
    disk: Optional[Disk]
    mounts: tuple[str, ...]
    network: str
    iocm: Optional[Iocm]
    vrdma: bool
    unclot_mib: Optional[int]
    suspend: bool = False


class Checker:
    """Holds values against one policy. `sources` says where a key's value came from; others are defaults."""

    def __init__(self, config: Config, policy: Policy, sources: Mapping[str, str]) -> None:
        self.config = config
        self.policy = policy
        self.sources = sources

    def source(self, key: str) -> str:
        """The place of a key's value, in brackets; nothing for a default."""
        return f" ({self.sources[key]})" if key in self.sources else ""

    def refused(self, key: str, value: object, reason: str, hint: str) -> VTorqueError:
        return VTorqueError(f"{key}={show(key, value)}{self.source(key)} {reason}", code=Code.POLICY, hint=hint)

    def switched_on(self, key: str, value: object) -> None:
        """Refuse a key that the site has switched off."""
        if not self.policy.enabled(key):
            origin = self.policy.origin(key, "enabled")
            raise self.refused(key, value, "is refused", f"{key} is switched off here (policy.{key}.enabled, {origin})")

    def bounded(self, key: str, value: int) -> None:
        """Refuse a number or size outside of its bounds."""
        bounds = self.policy.bounds(key)
        side = bounds.broken_by(value)
        if side is not None:
            low, high = show(key, bounds.min), show(key, bounds.max)
            relation = f"below the minimum {low}" if side == "min" else f"above the maximum {high}"
            raise self.refused(
                key, value, f"is {relation}", f"{low} to {high} is allowed ({self.policy.origin(key, side)})"
            )  # fmt: skip

    def chosen(self, key: str, value: str) -> None:
        """Refuse a word that is not among what is allowed."""
        allowed = self.policy.allowed(key)
        if allowed is not None and not is_among(value, allowed):
            origin = self.policy.origin(key, "allowed")
            hint = f"allowed: {', '.join(allowed) or 'nothing'} ({origin})"
            raise self.refused(key, value, "is not allowed", hint)

    def available(self, component: str) -> None:
        """Refuse a component that the site has not."""
        if not self.config.components[component]:
            origin = self.config.origin(f"components.{component}")
            raise self.refused(component, True, "is not available on this site", f"components.{component}, {origin}")

    def group(self, group: GuestGroup) -> None:
        """Refuse a guest group that breaks the policy."""
        for key, value in zip(BOUNDED, (group.vcpus, group.ram_mib, group.per_node)):
            self.bounded(key, value)
        if group.image.startswith("/"):
            self._own_image(group.image)
        else:
            self.chosen("img", group.image)
        if group.image != self.policy.default("img"):
            self.switched_on("img", group.image)
        if group.per_node != self.policy.bounds("vms_per_node").default:
            self.switched_on("vms_per_node", group.per_node)

    def _own_image(self, path: str) -> None:
        """Refuse a user's own disk where the site allows none, and a path that is more than a line."""
        key = "images.allow_user_images"
        if not path.isprintable():
            raise VTorqueError(
                f"img={path}{self.source('img')} holds control characters", code=Code.VALUE, hint="rename the file"
            )
        if not self.config.images.allow_user_images:
            raise self.refused(
                "img", path, "is a disk of your own", f"those are not allowed ({key}, {self.config.origin(key)})"
            )

    def size(self, group: GuestGroup, image: Image) -> None:
        """Refuse vCPUs and RAM that somebody chose where the site has switched that off.

        A default may have shrunk, grown where the policy lets it, or been raised to what the image needs.
        """
        if self.policy.flag("grow_defaults"):
            return
        for key, value, least in (("vcpus", group.vcpus, 0), ("ram", group.ram_mib, image.min_ram_mib)):
            if value > max(self.policy.bounds(key).default, least):
                self.switched_on(key, value)

    def features(self, features: Features) -> None:
        """Refuse what breaks the policy, or what the site has not."""
        for key, word, usual in (
            ("vcpu_pinning", features.pinning, [self.policy.default("vcpu_pinning")]),
            ("fs_type", features.fs_type, [self.policy.default("fs_type")]),
            ("network", features.network, [self.policy.network(guests) for guests in (1, 2)]),
        ):
            self.chosen(key, word)
            if word not in usual:
                self.switched_on(key, word)
        for name in features.mounts:
            self._share(name, features.mounts)
        if features.mounts != default_mounts(self.config, self.policy):
            self.switched_on("mounts", features.mounts)
        if features.disk is not None:
            self._disk(features.disk, features.mounts)
        if features.iocm is not None:
            self._component("iocm", zip(IOCM_CORES, features.iocm))
            if features.iocm.min_cores > features.iocm.max_cores:
                raise self.refused(
                    "iocm_min_cores", features.iocm.min_cores, f"is above iocm_max_cores={features.iocm.max_cores}",
                    "give a range",
                )  # fmt: skip
        if features.vrdma:
            self._component("vrdma", ())
        if features.unclot_mib is not None:
            self._component("unclot", (("unclot_shmem", features.unclot_mib),))
        for name, on in (
            ("iocm", features.iocm is not None), ("vrdma", features.vrdma), ("unclot", features.unclot_mib is not None)
        ):  # fmt: skip
            if on != self.policy.default(name):
                self.switched_on(name, on)

    def _component(self, name: str, numbers: Iterable[tuple[str, int]]) -> None:
        self.available(name)
        for key, value in numbers:
            self.bounded(key, value)
            if value != self.policy.bounds(key).default:
                self.switched_on(key, value)

    def _share(self, name: str, mounts: tuple[str, ...]) -> None:
        if mounts.count(name) > 1:
            raise self.refused("mounts", mounts, f"names {name} twice", "name each share once")
        known = [mount.name for mount in self.config.mounts]
        if name not in known:
            raise self.refused("mounts", mounts, f"names {name}, which the site has not", f"shares: {', '.join(known)}")
        self.chosen("mounts", name)

    def _disk(self, disk: Disk, shares: tuple[str, ...]) -> None:
        size = disk.size_mib
        taken = next((m.name for m in self.config.mounts if m.name in shares and m.target == DATA_FOLDER), None)
        if taken is not None:
            raise self.refused(
                "disk", disk.image if size is None else size, f"has its place at {DATA_FOLDER}, where {taken} is",
                f"leave {taken} out of mounts=",
            )  # fmt: skip
        self.switched_on("disk", disk.image if size is None else size)
        most = self.policy.leaf("disk", "max")
        if size is not None and size > most:
            origin = self.policy.origin("disk", "max")
            raise self.refused("disk", size, "is too large", f"at most {format_size_mib(most)} ({origin})")


def default_mounts(config: Config, policy: Policy) -> tuple[str, ...]:
    """The shares of a guest whose user names none: the policy's, else all that are allowed."""
    default, allowed = policy.default("mounts"), policy.allowed("mounts")
    names = tuple(mount.name for mount in config.mounts)
    if default is not None:
        return tuple(name for name in names if name in default)
    return names if allowed is None else tuple(name for name in names if name in allowed)


def guest_group(request: Request, checker: Checker) -> GuestGroup:
    """The guests that a request and the site's defaults come to, checked against the policy.

    Raises VTorqueError: VT-POLICY naming value, bound and the place of both; VT-IMAGE when no image is named.
    """
    policy = checker.policy
    for key, asked in request.items():
        checker.switched_on(key, asked.value)
    image = request["img"].value if "img" in request else policy.default("img")
    if image is None:
        raise VTorqueError(
            "no image is asked for and the site sets no default (policy.img.default)",
            code=Code.IMAGE,
            hint="add -vm img=NAME, or -vm off for a job without guests",
        )
    vcpus, ram_mib, per_node = (number(key, request, policy) for key in BOUNDED)
    group = GuestGroup(image=str(image), per_node=per_node, vcpus=vcpus, ram_mib=ram_mib)
    checker.group(group)
    return group


def number(key: str, request: Request, policy: Policy) -> int:
    """The number or size that is asked for, else the default."""
    return int(request[key].value) if key in request else policy.bounds(key).default  # type: ignore[arg-type]


def guest_features(request: Request, checker: Checker, guests: int) -> Features:
    """What else a request for so many guests and the site's defaults come to, checked.

    Raises VTorqueError (VT-POLICY, VT-KEY).
    """
    policy = checker.policy

    def value(key: str) -> Value:
        return request[key].value if key in request else policy.default(key)

    for component, keys in COMPONENTS.items():
        lone = next((key for key in keys if key in request), None)
        if lone and not value(component):
            raise VTorqueError(
                f"{lone}{checker.source(lone)} means nothing without {component}",
                code=Code.KEY,
                hint=f"add {component}=true",
            )
    pinning = str(value("vcpu_pinning"))
    disk = request["disk"].value if "disk" in request else None
    wanted = request["mounts"].value if "mounts" in request else default_mounts(checker.config, policy)
    features = Features(
        pinning=pinning if pinning in PINNINGS else "file",
        fs_type=str(value("fs_type")),
        disk=None if disk is None else Disk(None, disk) if isinstance(disk, int) else Disk(str(disk), None),
        mounts=tuple(wanted),  # type: ignore[arg-type]
        network=str(request["network"].value) if "network" in request else policy.network(guests),
        iocm=Iocm(*(number(key, request, policy) for key in IOCM_CORES)) if value("iocm") else None,
        vrdma=bool(value("vrdma")),
        unclot_mib=number("unclot_shmem", request, policy) if value("unclot") else None,
    )
    checker.features(features)
    return features


def against_suspension(features: Features, image: str, *, interactive: bool, rerunnable: bool = True) -> Optional[str]:
    """What of a job does not go with its suspension, as its user would write it; None where nothing does.

    `image` is the one that is asked for.
    """
    found = (
        (interactive, "an interactive job (-I)"),
        (not rerunnable, "-r n, because a suspended job is requeued"),
        (features.network == "bridge", "network=bridge"),
        (image.startswith("/"), f"a disk of your own, img={image}"),
        (features.iocm is not None, "iocm=true"),
        (features.vrdma, "vrdma=true"),
        (features.unclot_mib is not None, "unclot=true"),
    )
    return next((what for is_so, what in found if is_so), None)


def suspendable(asked: Optional[bool], against: Optional[str], checker: Checker) -> bool:
    """Whether a job can be suspended: as asked, else as the policy has it where nothing is `against` it.

    Raises VTorqueError (VT-POLICY) for a job that is to be and cannot.
    """
    usual, folder = bool(checker.policy.default("suspend")), checker.config.suspended.folder
    if asked is None:
        return usual and folder is not None and against is None
    if asked and not usual:
        checker.switched_on("suspend", asked)
    if asked and folder is None:
        origin = checker.config.origin("suspended.folder")
        raise checker.refused(
            "suspend", asked, "is not available on this site", f"suspended.folder is not set, {origin}"
        )
    if asked and against is not None:
        raise checker.refused("suspend", asked, f"does not go with {against}", "leave one of the two out")
    return asked


def choose_image(group: GuestGroup, distro: Optional[str], arch: Optional[str], checker: Checker) -> Image:
    """The image of a group, which must exist and be what the user says it is."""
    if group.image.startswith("/"):
        return _own_image(group.image, distro, arch, checker)
    try:
        image = Pool(checker.config.pool).get(group.image)
    except VTorqueError as err:
        place = checker.source("img") or f" ({checker.policy.origin('img', 'default')})"
        raise VTorqueError(f"img={group.image}{place}: {err.message}", code=err.code, hint=err.hint) from None
    _check_said(image, distro, arch, checker)
    return image


def _check_said(image: Image, distro: Optional[str], arch: Optional[str], checker: Checker) -> None:
    for key, said, true in (
        ("distro", distro, (image.family.lower(), image.distro.lower())),
        ("arch", arch, _names_of(image.arch)),
    ):
        if said is not None and said.lower() not in true:
            real = f"{image.family} ({image.distro})" if key == "distro" else image.arch
            raise VTorqueError(
                f"{key}={said}{checker.source(key)} does not describe the image {image.name}",
                code=Code.IMAGE,
                hint=f"it is {real}; {key}= asserts, img= selects",
            )


def _own_image(path: str, distro: Optional[str], arch: Optional[str], checker: Checker) -> Image:
    """A user's own disk, which boots by itself. Family, features and least RAM are those of an image of the pool.

    That is the site's default, or with `distro` the first of that family or distribution. What the disk holds is for
    the node to see, with the user's rights.
    """
    like = _like(distro, checker)
    folder, _, name = path.rpartition("/")
    features = (*(feature for feature in like.features if feature not in ("direct-boot", "disk-boot")), "disk-boot")
    image = like._replace(
        folder=folder or "/", name=path, revision=0, description="", created="", disk=name, disk_format="qcow2",
        virtual_size=0, kernel=None, initrd=None, cmdline="", features=features, files={}, packages=None,
        recipe_hash="", added_by="", parent=None,
    )  # fmt: skip
    _check_said(image, distro, arch, checker)
    return image


def guessed_family(image: Image, distro: Optional[str], checker: Checker) -> Optional[str]:
    """What to tell a user whose own disk, `image`, is taken to be of the default image's family, as nothing was said.

    None where the family was said, the image is of the pool, or the pool knows no other family.
    """
    if distro is not None or not image.name.startswith("/"):
        return None
    known = {each.family for each in Pool(checker.config.pool).newest(broken=lambda _problem: None)} - {image.family}
    if not known:
        return None
    return (
        f"img={image.name} is taken to be of the family {image.family}, as the default image is; "
        f"distro=FAMILY says otherwise: {', '.join(sorted(known))}"
    )


def _like(distro: Optional[str], checker: Checker) -> Image:
    pool, default = Pool(checker.config.pool), checker.policy.default("img")
    if distro is None and default is not None:
        return pool.get(str(default))
    if distro is not None:
        for image in pool.newest(broken=lambda _problem: None):
            if distro.lower() in (image.family.lower(), image.distro.lower()):
                return image
    known = sorted({image.family for image in pool.newest(broken=lambda _problem: None)})
    raise VTorqueError(
        f"of what family is your image{checker.source('img')}?" if distro is None
        else f"distro={distro}{checker.source('distro')} is the family of no image here",
        code=Code.IMAGE,
        hint=f"distro=FAMILY says it: {', '.join(known)}",
    )  # fmt: skip


def check_disk_of(image: Image, fs_type: str, checker: Checker) -> None:
    """Refuse copies of a disk of the user's own: it may change meanwhile, and has no checksum to hold them against."""
    if image.is_own and fs_type != "overlay":
        raise checker.refused("fs_type", fs_type, "makes a copy of a disk of your own", "fs_type=overlay does not")


def _names_of(arch: str) -> tuple[str, ...]:
    """An architecture's names: what `uname -m` says and what Debian says."""
    return next((names for names in ARCHITECTURES if arch.lower() in names), (arch.lower(),))


def with_room(group: GuestGroup, image: Image, request: Request, checker: Checker) -> GuestGroup:
    """The group with as much RAM as its image needs, where nobody asked for an amount and the policy has room.

    Raises VTorqueError (VT-POLICY) where the image needs more.
    """
    if "ram" not in request and group.ram_mib < image.min_ram_mib <= checker.policy.bounds("ram").max:
        group = group._replace(ram_mib=image.min_ram_mib)
    check_room(group, image, checker)
    return group


def check_room(group: GuestGroup, image: Image, checker: Checker) -> None:
    """Refuse a group with less RAM than its image needs."""
    if group.ram_mib < image.min_ram_mib:
        raise checker.refused(
            "ram", group.ram_mib, f"is less than the image {image.name} needs",
            f"at least {format_size_mib(image.min_ram_mib)} "
            f"(the image's description in {checker.config.pool})",
        )  # fmt: skip


def check_shares(names: Iterable[str], image: Image, checker: Checker, *, suspend: bool) -> None:
    """Refuse a share of a kind that the image has no driver for. `suspend`: the guests can be suspended."""
    for mount in checker.config.mounts:
        seen = mount.as_saved() if suspend else mount
        if mount.name in names and seen.kind not in image.features:
            other = "" if seen == mount else f"; by {mount.kind} it is there with suspend=off"
            raise VTorqueError(
                f"the image {image.name} cannot mount the share {mount.name}{checker.source('mounts')}, "
                f"which is of kind {seen.kind} ({checker.config.origin('mounts')})",
                code=Code.IMAGE,
                hint=f"choose another image, or leave {mount.name} out of mounts={other}",
            )


def check_metadata(keys: Mapping[str, object], image: Image, checker: Checker) -> None:
    """Refuse cloud-config that the site or the image does not take, key by key."""
    from vmgr.node.cloudconfig import KEYS as possible  # YAML, which most jobs do not need

    for key in keys:
        checker.chosen("metadata", key)
        if key not in possible:
            hint = f"possible: {', '.join(sorted(possible))}"
            raise checker.refused("metadata", key, "would change what vTorque itself makes of the guest", hint)
    if "cloud-init" not in image.features:
        raise VTorqueError(
            f"metadata{checker.source('metadata')} needs cloud-init, which the image {image.name} has not",
            code=Code.IMAGE,
            hint="choose another image",
        )


def check_spec(
    spec: Spec, config: Config, subject: Subject, source: str, *, nodes: int, stored: Optional[str] = None
) -> Image:
    """Root's second check of a specification, against the node's own configuration; gives the guests' image.

    `nodes` is how many the batch system gave to the job. Guests that go on have the revision `stored` (NAME@REVISION)
    of the image that is asked for, not its newest. Raises VTorqueError (VT-POLICY, VT-IMAGE).
    """
    if len(spec.groups) != 1:
        raise VTorqueError(f"{source} asks for {len(spec.groups)} guest groups", code=Code.POLICY, hint="1 is allowed")
    policy = config.policy_for(subject)
    checker = Checker(config, policy, dict.fromkeys((*BOUNDED, "img", "distro", "arch", *spec.asked), source))
    group = spec.groups[0]
    _check_nodes(nodes, policy)
    checker.group(group)
    pinning = "file" if spec.pinning.mode == "map" else spec.pinning.mode
    features = Features(
        pinning, spec.fs_type, spec.disk, spec.mounts, spec.network, spec.iocm, spec.vrdma, spec.unclot_mib,
        spec.suspend,
    )  # fmt: skip
    checker.features(features)
    against = against_suspension(features, group.image, interactive=spec.interactive)
    suspendable(spec.suspend, against, checker)
    for key, given in (("vm_prologue", spec.vm_prologue), ("vm_epilogue", spec.vm_epilogue)):
        if given is not None:
            checker.switched_on(key, given)
    if spec.pinning.cpus is not None and [len(guest) for guest in spec.pinning.cpus] != [group.vcpus] * group.per_node:
        raise VTorqueError(f"{source} does not bind each vCPU of each guest", code=Code.POLICY)
    image = choose_image(group._replace(image=stored or group.image), spec.distro, spec.arch, checker)
    check_disk_of(image, spec.fs_type, checker)
    check_room(group, image, checker)
    checker.size(group, image)
    check_shares(spec.mounts, image, checker, suspend=spec.suspend)
    if spec.metadata is not None:
        checker.switched_on("metadata", "cloud-config")
        check_metadata(spec.metadata, image, checker)
    return image


def _check_nodes(nodes: int, policy: Policy) -> None:
    bounds = policy.bounds("nodes")
    side = bounds.broken_by(nodes)
    if side is not None:
        raise VTorqueError(
            f"the job has {nodes} nodes",
            code=Code.POLICY,
            hint=f"{bounds.min} to {bounds.max} are allowed ({policy.origin('nodes', side)})",
        )


def visible_in_guest(path: str, mounts: tuple[Mount, ...]) -> bool:
    """Whether a folder of the node is seen in the guest under the same path. `mounts` are those of one user."""
    return any(
        mount.source == mount.target and (path == mount.target or path.startswith(mount.target.rstrip("/") + "/"))
        for mount in mounts
    )
