"""What an installation has outside of its prefix on a front end, so that users find it: links and a profile snippet."""

from __future__ import annotations

import os
from typing import Optional

from vmgr.deploy.build import COMPLETIONS
from vmgr.deploy.manifest import Manifest
from vmgr.deploy.places import folder_wants
from vmgr.deploy.wants import FILE, LINK, Want

PLACE = "/usr/local"
PROFILE = "/etc/profile.d"

_SNIPPET = """\
# vTorque: vsub, vmgr and their man pages, for everybody
case :$PATH: in
*:{prefix}/bin:*) ;;
*) PATH=$PATH:{prefix}/bin ;;
esac
"""


def wants(prefix: str, manifest: Optional[Manifest]) -> list[Want]:
    """Links to the programs, their man pages and completions in PLACE, and a snippet in PROFILE where that is."""
    links = {f"{PLACE}/bin/{name}": f"{prefix}/bin/{name}" for name in ("vsub", "vmgr")}
    for page in ("vsub.1", "vmgr.1"):
        links[f"{PLACE}/share/man/man1/{page}"] = f"{prefix}/share/man/man1/{page}"
    for name in COMPLETIONS.values():
        links[f"{PLACE}/share/{name}"] = f"{prefix}/share/{name}"
    found: dict[str, Want] = {}
    for path, target in links.items():
        found.update((want.path, want) for want in folder_wants(os.path.dirname(path), manifest))
        found[path] = Want(path, LINK, target=target)
    if os.path.isdir(PROFILE):
        path = f"{PROFILE}/vtorque.sh"
        found[path] = Want(path, FILE, 0o644, _SNIPPET.format(prefix=prefix).encode())
    return [*found.values()]
