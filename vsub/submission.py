"""A guest job that is planned: its files, its command line, and giving it to the batch system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Optional

from vmgr.config import Config
from vmgr.jobspec import Spec, spec_hash
from vmgr.paths import Installation
from vsub.account import Account
from vsub.engines import Engine, GuestJob
from vsub.jobdir import JobDirectory
from vsub.plan import Plan
from vsub.qsub import Submitted, run_qsub
from vsub.report import debug


class Written(NamedTuple):
    """What a submission consists of: the job directory, its specification, the command line and its environment.

    `environment` is None where it is ours.
    """

    directory: str
    spec: Spec
    argv: list[str]
    environment: Optional[dict[str, str]]


class Submission:
    """One guest job on its way to the batch system."""

    def __init__(self, plan: Plan, account: Account, config: Config, engine: Engine, install: Installation) -> None:
        self.plan = plan
        self.account = account
        self._config = config
        self.engine = engine
        self._install = install

    @contextmanager
    def written(self, qsub: str, *, keep: bool, home: Optional[str] = None) -> Iterator[tuple[JobDirectory, Written]]:
        """The job's files, written into the home, or into a stand-in for it; gone again afterwards unless kept."""
        umask = os.umask(0o077)
        try:
            with JobDirectory(self.account.home, self.account.uid, stand_in=home) as directory:
                spec = self._spec(directory, keep)
                path = directory.write(spec, self._files(), self._programs())
                debug(f"wrote {path}")
                os.umask(umask)  # qsub may pass it on to the job
                job = self.job(path)
                argv = [qsub, *self.engine.guest_arguments(job)]
                yield directory, Written(path, spec, argv, self.engine.guest_environment(job))
        finally:
            os.umask(umask)

    def submit(self, qsub: str, *, keep: bool) -> Submitted:
        """Write the job directory and call `qsub`. Nothing is left in the home unless `qsub` took the job."""
        with self.written(qsub, keep=keep) as (directory, written):
            debug(f"running {written.argv}")
            ended = run_qsub(written.argv, written.environment)
            submitted = Submitted(written.argv, ended, True, silent=self.plan.last("z") is not None)
            if not submitted.taken:
                return submitted
            directory.keep(self.engine.noted_id(ended.output))
            return submitted._replace(directory=written.directory)

    def job(self, directory: str) -> GuestJob:
        """What the batch system is to be told of a job whose directory is this."""
        plan = self.plan
        return GuestJob(
            options=plan.options,
            fitted=plan.fitted,
            directory=directory,
            program=self._install.program("vtorque-job"),
            job_name=plan.job_name,
            interactive=plan.interactive,
            node_access=self._config.submit.node_access,
            job_type=self._config.submit.job_type,
            suspendable=plan.features.suspend,
        )

    def _files(self) -> dict[str, bytes]:
        script = {} if self.plan.script is None else {"script": self.plan.script.data}
        return {**script, **self.plan.hooks}

    def _programs(self) -> dict[str, list[str]]:
        own = self.plan.own_prologue
        prologue = [self._install.program("vtorque-user-prologue"), *(() if own is None else ("--then", own, "--"))]
        return {"prologue": prologue, "job": [self._install.program("vtorque-job"), "{}"]}

    def _spec(self, directory: JobDirectory, keep: bool) -> Spec:
        plan, features = self.plan, self.plan.features
        hooks = {key: spec_hash(data) for key, data in plan.hooks.items()}
        request = plan.request
        return Spec(
            ruid=directory.ruid,
            groups=(plan.fitted.group,),
            asked=tuple(sorted(request)),
            distro=str(request["distro"].value) if "distro" in request else None,
            arch=str(request["arch"].value) if "arch" in request else None,
            pinning=plan.pinning,
            fs_type=features.fs_type,
            disk=features.disk,
            metadata=plan.metadata,
            mounts=features.mounts,
            network=features.network,
            suspend=features.suspend,
            iocm=features.iocm,
            vrdma=features.vrdma,
            unclot_mib=features.unclot_mib,
            workdir=plan.workdir,
            shell=plan.shell,
            interactive=plan.interactive,
            array=plan.array,
            script=None if plan.script is None else spec_hash(plan.script.data),
            arguments=plan.arguments,
            vm_prologue=hooks.get("vm_prologue"),
            vm_epilogue=hooks.get("vm_epilogue"),
            ssh_public_key=directory.public_key(),
            keep=keep,
        )
