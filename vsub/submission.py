"""A guest job: checked against what guests can do and the site's policy, written into the home, given to `qsub`."""

from __future__ import annotations

import hashlib
import os
from typing import Optional

from vmgr.config import Config, Mount
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.jobspec import Spec
from vmgr.paths import Installation
from vmgr.policy import check_room, choose_image, guest_group, hooks_refused, visible_in_guest, with_room
from vmgr.request import Request
from vsub.account import Account
from vsub.honour import check_options, job_shell
from vsub.jobdir import JobDirectory
from vsub.options import Line, Option
from vsub.qsub import Submitted, run_qsub
from vsub.report import debug
from vsub.script import Script, check_text, read_user_file

HOOKS = ("vm_prologue", "vm_epilogue")


class GuestJob:
    """One guest job, checked: everything that can be refused has been when this exists."""

    def __init__(
        self, line: Line, directives: Line, script: Script, request: Request, account: Account, config: Config
    ) -> None:
        self.options = directives.options + line.options
        _check_usage(line, directives)
        check_options(self.options, account.name)
        self.account = account
        self.script = _as_job_script(script)
        self.group = guest_group(request, config)
        self.asked = tuple(sorted(request))
        self.sources = {key: asked.source for key, asked in request.items()}
        self.distro = str(request["distro"].value) if "distro" in request else None
        image = choose_image(self.group, self.distro, Pool(config.images.pool), config, self.sources)
        self.group = with_room(self.group, image, request, config)
        check_room(self.group, image, config, self.sources)
        debug(f"image {image.name}, {self.group.vcpus} vCPUs, {self.group.ram_mib} MiB")
        self.hooks = {key: self._hook(key, request, config) for key in HOOKS if key in request}
        self.mounts = tuple(mount.for_home(account.home) for mount in config.mounts)
        self.shell = job_shell(self._last("S"))
        self.workdir = self._workdir()

    def _last(self, letter: str) -> Optional[Option]:
        return next((option for option in reversed(self.options) if option.letter == letter), None)

    def _hook(self, key: str, request: Request, config: Config) -> bytes:
        if not config.policy.user_vm_hooks:
            raise hooks_refused(config, self.sources[key])
        return read_user_file(str(request[key].value), key)

    def _workdir(self) -> str:
        """The folder in which the job starts: `-d`, else `-w`, else where the user is; it must be in the guest too."""
        here = submission_directory()
        option = self._last("d") or self._last("w")
        workdir = _below(here, option.value or "") if option else here
        if not is_visible(workdir, self.mounts):
            shown = ", ".join(mount.target for mount in self.mounts if mount.source == mount.target)
            raise VTorqueError(
                f"the job's directory {workdir!r} ({option.source if option else 'where you are'}) is not visible "
                "in the guest",
                code=Code.WORKDIR,
                hint=f"visible: {shown or 'nothing'}; submit from there, or give -d",
            )
        return workdir

    def qsub_arguments(self, directory: str, program: str) -> list[str]:
        """qsub's arguments for the wrapper in the job directory.

        The prologue is the first resource of all, for resources that do not fit are dropped from the end.
        The wrapper holds no directives (`-C ''`), and the job's shell is the program that it names, so that no
        shell stands between the batch system's signals and it; the script's own shell is in the specification.
        Directives come before the user's options: the last one wins. Of `-z` vsub takes care itself, for it
        needs the job's id.
        """
        arguments = [
            "-C", "",
            "-l", f"prologue={directory}/prologue",
            "-S", program,
        ]  # fmt: skip
        if self._last("N") is None:
            arguments += ["-N", self.script.job_name]
        for option in self.options:
            if option.letter not in "CSz":
                arguments += option.argv()
        return [*arguments, f"{directory}/job"]

    def submit(self, qsub: str, install: Installation, *, keep: bool) -> Submitted:
        """Write the job directory and call `qsub`. Nothing is left in the home unless `qsub` took the job."""
        umask = os.umask(0o077)
        try:
            with JobDirectory(self.account.home, self.account.uid) as directory:
                path = self._write(directory, install, keep)
                argv = [qsub, *self.qsub_arguments(path, os.fspath(install.libexec / "vtorque-job"))]
                debug(f"running {argv}")
                os.umask(umask)  # qsub may pass it on to the job
                status, output = run_qsub(argv)
                if status == 0:
                    directory.keep(b"".join(output.split()[-1:]))
        finally:
            os.umask(umask)
        return Submitted(status, b"" if self._last("z") else output, path if status == 0 else None)

    def _write(self, directory: JobDirectory, install: Installation, keep: bool) -> str:
        script = hashlib.sha256(self.script.data).hexdigest()
        hooks = {key: hashlib.sha256(data).hexdigest() for key, data in self.hooks.items()}
        spec = Spec(
            ruid=directory.ruid,
            groups=(self.group,),
            asked=self.asked,
            distro=self.distro,
            mounts=tuple(mount.name for mount in self.mounts),
            network="user",
            workdir=self.workdir,
            shell=self.shell,
            script=script,
            vm_prologue=hooks.get("vm_prologue"),
            vm_epilogue=hooks.get("vm_epilogue"),
            ssh_public_key=directory.public_key(),
            keep=keep,
        )
        path = directory.write(
            spec,
            {"script": self.script.data, **self.hooks},
            {
                "prologue": [str(install.libexec / "vtorque-user-prologue")],
                "job": [str(install.libexec / "vtorque-job"), "{}"],
            },
        )
        debug(f"wrote {path}")
        return path


def submission_directory() -> str:
    """Where the user is, by the name that the user knows it by (`$PWD`) where that is true."""
    named = os.environ.get("PWD", "")
    try:
        here = os.getcwd()
        if named.startswith("/") and os.path.samestat(os.stat(named), os.stat(".")):
            return named
    except OSError as err:
        raise VTorqueError(f"the current directory is gone: {err.strerror}", code=Code.WORKDIR) from err
    return here


def _below(folder: str, path: str) -> str:
    """`path` as seen from `folder`; not normalised, for `..` behind a link is not what it seems."""
    return path if path.startswith("/") else f"{folder.rstrip('/')}/{path}" if path else folder


def is_visible(path: str, mounts: tuple[Mount, ...]) -> bool:
    """Whether a folder of this machine is seen in the guest under the same path, also behind symbolic links.

    A share whose own source is reached by a link (a home that is one) still shows what is below it.
    """
    if not visible_in_guest(path, mounts):
        return False
    real = os.path.realpath(path)
    same = [mount for mount in mounts if mount.source == mount.target]
    resolved = tuple(
        mount._replace(source=source, target=source)
        for mount in same
        for source in {mount.source, os.path.realpath(mount.source)}
    )
    return visible_in_guest(real, resolved)


def _as_job_script(script: Script) -> Script:
    """The script as the job runs it: on standard input qsub turns DOS line ends, in a file it refuses them."""
    if script.from_stdin:
        script = script._replace(data=script.data.replace(b"\r\n", b"\n"))
    check_text(script.data, "the job script" if script.from_stdin else f"the job script {script.name!r}")
    return script


def _check_usage(line: Line, directives: Line) -> None:
    """Refuse what qsub would not understand. Raises VTorqueError (VT-USAGE)."""
    problem = line.problem or directives.problem
    if problem:
        raise VTorqueError(problem, code=Code.USAGE, hint="see vsub --help and man qsub")
    if len(line.operands) > 1:
        raise VTorqueError(
            f"one script can be submitted, not also {line.operands[1]!r}", code=Code.USAGE, hint="quote its path"
        )
