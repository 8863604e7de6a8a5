"""A real TORQUE under the tests: an installation for it, and the hooks in the `mom_priv` of its node.

VTORQUE_TEST_QSUB names its qsub, VTORQUE_TEST_TORQUE_HOME its server's home (PBS_HOME) on this machine, where a mom
with an empty `mom_priv` (no hooks) serves one node.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmgr.deploy.hookfiles import WRAP, hook_files

from .conftest import CONFIG, PATIENCE_S, POOL, REPOSITORY, Site, eventually

QSUB, HOME = os.environ.get("VTORQUE_TEST_QSUB"), os.environ.get("VTORQUE_TEST_TORQUE_HOME")
MISSING = "" if QSUB and HOME else "no TORQUE: VTORQUE_TEST_QSUB and VTORQUE_TEST_TORQUE_HOME are not set"
"""Why there is none; empty where there is one."""
HOOKS = {hook.target: hook.source for hook in hook_files(WRAP) if hook.always}


class TorqueSite(Site):
    """An installation for the TORQUE that is there."""

    engine = "torque"

    def command(self, name: str, *arguments: str) -> list[str]:
        return [str(Path(str(QSUB)).with_name(name)), *arguments]

    def letter(self, job_id: str) -> str:
        return self.state(job_id)["job_state"]

    def state(self, job_id: str) -> dict[str, str]:
        shown = self.client("qstat", "-f", "-1", job_id).stdout
        return dict(
            re.findall(r"^ {4}(job_state|Hold_Types|exit_status|resources_used\.walltime) = (.*)$", shown, re.MULTILINE)
        )

    def wait(self, job_id: str) -> int:
        eventually(lambda: self.state(job_id).get("job_state") == "C", f"the end of {job_id}")
        return int(self.state(job_id)["exit_status"])

    def left_behind(self) -> list[str]:
        return [line for line in super().left_behind() if "mom_priv" not in line]


@contextmanager
def torque_site(text: str = CONFIG) -> Iterator[TorqueSite]:
    """vTorque installed with the engine torque, its hooks in the mom's folder. `text` is that of the embedded one."""
    word = secrets.token_hex(3)
    prefix, root = Path(f"/opt/vtorque-test-{word}"), Path(f"/var/lib/vtorque-test-{word}")
    here = TorqueSite(prefix, root)
    mom_priv = Path(str(HOME)) / "mom_priv"
    there = [name for name in HOOKS if (mom_priv / name).exists()]
    assert not there, f"{mom_priv} has hooks of its own: {there}"
    try:
        for folder in (root, root / "opt", root / "vm", root / "log"):
            folder.mkdir(mode=0o755)
        text = text.format(root=root, run=here.run, pool=POOL).replace("engine: local", "engine: torque")
        names = ("qsub", "qstat", "qhold", "qrls", "qrerun", "pbsnodes")
        programs = ", ".join(f"{name}: {Path(str(QSUB)).with_name(name)}" for name in names)
        text = text.replace("submit: {without_vm: guest}", f"submit: {{{programs}}}")
        (root / "site.yaml").write_text(text)
        install = [str(REPOSITORY / "install.sh"), "--prefix", str(prefix), "--config", str(root / "site.yaml")]
        install.append("--no-links")
        subprocess.run(install, check=True, timeout=PATIENCE_S)
        for name, source in HOOKS.items():
            shutil.copy(prefix / "share" / "vtorque" / "mom_priv_hooks" / source, mom_priv / name)
        yield here
    finally:
        for name in set(HOOKS) - set(there):
            (mom_priv / name).unlink(missing_ok=True)
        for folder in (prefix, root, here.run):
            shutil.rmtree(folder, ignore_errors=True)
