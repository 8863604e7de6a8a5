"""The site's policy, held against what a job asks for: by `vsub` before it submits, and again by root on the node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from vmgr.config import Bounds, Config, Mount
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.jobspec import GuestGroup, Spec
from vmgr.request import Request
from vmgr.units import format_size_mib


def guest_group(request: Request, config: Config) -> GuestGroup:
    """What a request and the site's defaults come to, checked against the policy.

    Raises VTorqueError: VT-POLICY naming value, bound and the place of both; VT-IMAGE when no image is named.
    """
    sources = {key: asked.source for key, asked in request.items()}
    image = request["img"].value if "img" in request else config.policy.img.default
    if image is None:
        raise VTorqueError(
            "no image is asked for and the site sets no default (policy.img.default)",
            code=Code.IMAGE,
            hint="add -vm img=NAME, or -vm off for a job without guests",
        )

    def number(key: str, bounds: Bounds) -> int:
        return int(request[key].value) if key in request else bounds.default

    group = GuestGroup(
        image=str(image),
        per_node=number("vms_per_node", config.policy.vms_per_node),
        vcpus=number("vcpus", config.policy.vcpus),
        ram_mib=number("ram", config.policy.ram),
    )
    check_group(group, config, sources)
    return group


def with_room(group: GuestGroup, image: Image, request: Request, config: Config) -> GuestGroup:
    """The group with as much RAM as its image needs, where nobody asked for an amount and the policy has room."""
    if "ram" in request or not group.ram_mib < image.min_ram_mib <= config.policy.ram.max:
        return group
    return group._replace(ram_mib=image.min_ram_mib)


def check_group(group: GuestGroup, config: Config, sources: Mapping[str, str]) -> None:
    """Refuse a guest group that breaks the policy. `sources` says where a key's value came from, by key."""
    policy = config.policy
    _bounded("vcpus", group.vcpus, policy.vcpus, str, config, sources)
    _bounded("ram", group.ram_mib, policy.ram, format_size_mib, config, sources)
    _bounded("vms_per_node", group.per_node, policy.vms_per_node, str, config, sources)
    allowed = policy.img.allowed
    if allowed is not None and group.image not in allowed:
        raise VTorqueError(
            f"img={group.image}{_from('img', sources)} is not allowed",
            code=Code.POLICY,
            hint=f"allowed: {', '.join(allowed)} ({config.origin('policy.img.allowed')})",
        )


def choose_image(
    group: GuestGroup, distro: Optional[str], pool: Pool, config: Config, sources: Mapping[str, str]
) -> Image:
    """The image of a group, which must exist and be what the user says it is."""
    try:
        image = pool.get(group.image)
    except VTorqueError as err:
        place = _from("img", sources) or f" ({config.origin('policy.img.default')})"
        raise VTorqueError(f"img={group.image}{place}: {err.message}", code=err.code, hint=err.hint) from None
    if distro is not None and distro.lower() not in (image.family.lower(), image.distro.lower()):
        raise VTorqueError(
            f"distro={distro}{_from('distro', sources)} does not describe the image {image.name}",
            code=Code.IMAGE,
            hint=f"it is {image.family} ({image.distro}); distro= asserts, img= selects",
        )
    return image


def check_room(group: GuestGroup, image: Image, config: Config, sources: Mapping[str, str]) -> None:
    """Refuse a group with less RAM than its image needs."""
    if group.ram_mib < image.min_ram_mib:
        raise VTorqueError(
            f"ram={format_size_mib(group.ram_mib)}{_from('ram', sources)} is less than the image {image.name} needs",
            code=Code.POLICY,
            hint=f"at least {format_size_mib(image.min_ram_mib)} (the image's description in {config.images.pool})",
        )


def check_spec(spec: Spec, config: Config, source: str) -> Image:
    """Root's second check of a specification, against the node's own configuration; gives the guests' image."""
    if len(spec.groups) != 1:
        raise VTorqueError(f"{source} asks for {len(spec.groups)} guest groups", code=Code.POLICY, hint="1 is allowed")
    sources = dict.fromkeys(("img", "distro", "vcpus", "ram", "vms_per_node"), source)
    group = spec.groups[0]
    check_group(group, config, sources)
    if not config.policy.user_vm_hooks and (spec.vm_prologue or spec.vm_epilogue):
        raise hooks_refused(config, source)
    unknown = set(spec.mounts) - {mount.name for mount in config.mounts}
    if unknown:
        raise VTorqueError(f"{source} asks for the share {min(unknown)}, which the site has not", code=Code.POLICY)
    image = choose_image(group, spec.distro, Pool(config.images.pool), config, sources)
    check_room(group, image, config, sources)
    return image


def hooks_refused(config: Config, source: str) -> VTorqueError:
    """The refusal of a user's own VM prologue or epilogue."""
    return VTorqueError(
        f"{source} asks for a VM prologue or epilogue of the user's",
        code=Code.POLICY,
        hint=f"not allowed here (policy.user_vm_hooks, {config.origin('policy.user_vm_hooks')})",
    )


def visible_in_guest(path: str, mounts: tuple[Mount, ...]) -> bool:
    """Whether a folder of the node is seen in the guest under the same path. `mounts` are those of one user."""
    return any(
        mount.source == mount.target and (path == mount.target or path.startswith(mount.target.rstrip("/") + "/"))
        for mount in mounts
    )


def _bounded(
    key: str, value: int, bounds: Bounds, show: Callable[[int], str], config: Config, sources: Mapping[str, str]
) -> None:
    for side, bound, broken in (("min", bounds.min, value < bounds.min), ("max", bounds.max, value > bounds.max)):
        if broken:
            relation = "below the minimum" if side == "min" else "above the maximum"
            raise VTorqueError(
                f"{key}={show(value)}{_from(key, sources)} is {relation} {show(bound)}",
                code=Code.POLICY,
                hint=f"{show(bounds.min)} to {show(bounds.max)} is allowed ({config.origin(f'policy.{key}.{side}')})",
            )


def _from(key: str, sources: Mapping[str, str]) -> str:
    return f" ({sources[key]})" if key in sources else ""
