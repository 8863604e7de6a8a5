"""Whether the NoCloud seed of a guest can be made here for each family of images, by making one in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool
from vmgr.node.network.plan import GuestNet
from vmgr.node.seed import SeedPlan, pack_seed, seed_files, site_hooks
from vmgr.node.user import User

_find = finder("seeds")
_USER = User("user", 1000, 1000, "users", "/home/user", "/bin/sh", ())


def check(node: Node) -> Iterator[Finding]:
    pool, families = Pool(node.config.pool), set()
    for name in pool.names():
        try:
            families.add(pool.get(name).family)
        except VTorqueError:
            continue  # the check of images tells
    if not families:
        yield _find(Level.NOTE, "there is no image for whose guests one could be made", "see what is said of images")
    made = []
    for family in sorted(families):
        problem = _problem(node, family)
        if problem is None:
            made.append(family)
        else:
            yield _find(
                Level.FAILURE, f"no seed can be made for guests of the family {family}: {problem}",
                f"see {node.install.templates / 'guest' / family}, or install vTorque anew",
            )  # fmt: skip
    if made:
        yield _find(Level.OK, f"can be made for guests of the families {', '.join(made)}")
    if node.config.vm_hooks is not None:
        yield from _hooks(node)


def sample(node: Node, family: str) -> SeedPlan:
    """The seed of a guest of somebody's, with the site's shares and networks."""
    network = node.config.network
    return SeedPlan(
        instance="sample", hostname="vnode-1", family=family, user=_USER, ssh_public_key="ssh-ed25519 AAAA",
        host_key="", host_key_pub="ssh-ed25519 AAAA", mounts=node.config.mounts,
        network=GuestNet("02:00:00:00:00:01", dns=network.dns, domain=network.domain, search=network.search),
        hosts=(("10.0.2.15", "vnode-1"),), slots=(("vnode-1", 1),), environment={},
    )  # fmt: skip


def _problem(node: Node, family: str) -> Optional[str]:
    try:
        pack_seed(seed_files(sample(node, family), node.install.templates, {}))
    except Exception as err:  # of templates that a site may have changed: all that jinja2 raises
        return f"{type(err).__name__}: {err}"
    return None


def _hooks(node: Node) -> Iterator[Finding]:
    """The site's VM hooks, as the guests of any rank get them."""
    folder = node.config.vm_hooks
    assert folder is not None
    names = []
    for rank in (0, 1):
        try:
            names += [f"{name}.parallel" if rank else name for name in site_hooks(folder, rank)]
        except VTorqueError as err:
            yield _find(Level.FAILURE, err.message, err.hint or "make it, or take guest.vm_hooks out")
            return
        except OSError as err:
            yield _find(Level.FAILURE, f"{err.filename} (guest.vm_hooks): {err.strerror}", "a hook is a readable file")
            return
    yield _find(Level.OK, f"VM hooks of the site in {folder}: {', '.join(names) or 'none'}")
