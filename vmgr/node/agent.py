"""The node agent: takes one attempt of a job from its record to a running guest, and back to nothing.

Started by the prologue hook with the attempt's folder, its lock on descriptor 3 and its listening socket on 4. It
lives as long as the attempt. Whenever it dies, its guest dies with it, and the record says what is left to undo.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Optional

from vmgr import logs
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.jobspec import as_plain
from vmgr.logs import LOGGER
from vmgr.node import process, record
from vmgr.node.allocation import guest_name, over, short
from vmgr.node.boot import ConsoleLogs, boot
from vmgr.node.checkedjob import Call, allocation_of, checked_job
from vmgr.node.control import Control
from vmgr.node.crew import Crew
from vmgr.node.fellows import Fellows, check_image, parse_ssh_ports
from vmgr.node.gate import Gate
from vmgr.node.guestjob import Job
from vmgr.node.jobfiles import status_name
from vmgr.node.meeting import FAILED, GONE, READY
from vmgr.node.orders import orders_of
from vmgr.node.resuming import Resumption, check_alike, told
from vmgr.node.shown import shown
from vmgr.node.state import Progress, publish
from vmgr.node.undo import undo, undo_older
from vmgr.node.user import User, look_up
from vmgr.node.userchild import MAX_DESCRIPTORS
from vmgr.node.waiting import all_of, every, first
from vmgr.node.workspace import keep_workspace, wipe_workspace
from vmgr.paths import installation
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.leftovers import Leftovers
    from vmgr.node.standin import StandIn
    from vmgr.node.survivor import Survivor
    from vmgr.node.suspension import Suspension

LOCK_FD, SOCKET_FD = 3, 4
LAST_ANSWER_SECONDS = 5.0
REPORT_SECONDS = 1.0
"""So long after an attempt's start its report begins, when its guests are not there before."""
MAX_REASON = 500


def main(argv: Sequence[str]) -> int:
    """Run the agent for the attempt in the folder `argv[0]`."""
    for fd in (LOCK_FD, SOCKET_FD):
        os.set_inheritable(fd, False)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_DESCRIPTORS, most), most))
    install = installation()
    config = load_config(install)
    place = next((p for p in record.places(config.paths) if str(p.folder) == argv[0]), None)
    if place is None:
        print(f"vtorque: {argv[0]} is no attempt's folder", file=sys.stderr)
        return 1
    me = process.identify(os.getpid())
    assert me is not None
    record.append(place, {"do": "process", "role": "agent", **me._asdict()})
    call = Call.of(record.begun(place))
    log = logs.set_up(
        config.logging, job=call.job_id, reader=_uid(call.user),
        lives=lambda job: record.newest_socket(config.paths, job) is not None,
    )  # fmt: skip
    if record.is_buried(config.paths, call.job_id, place):
        LOGGER.info("the job was deleted before its guest was started")
        undo(place)
        record.exhume(config.paths, call.job_id)
        return 0

    async def live() -> None:  # before Python 3.10 an event belongs to the loop in which it is made
        await Agent(config, install.templates, place, call, log).run(socket.socket(fileno=SOCKET_FD))

    try:
        for folder in (config.paths.spool, config.paths.run):
            check_trusted(folder)
        asyncio.run(live())
    except Exception:
        LOGGER.exception("fault; what is left is undone by the epilogue or the next agent")
        return 1
    return 0


def _uid(user: str) -> Optional[int]:
    """Who may read what is logged of the job; None for nobody but root."""
    try:
        return look_up(user).uid
    except VTorqueError:
        return None


def _reap(config: Config) -> None:
    from vmgr.node.reap import reap  # needed only when the guests are there

    try:
        for line in reap(config):
            LOGGER.warning("left by another job, removed: %s", line)
    except Exception:
        LOGGER.exception("the janitor failed")


class Agent:
    """One attempt on one node."""

    def __init__(self, config: Config, templates: Path, place: record.Place, call: Call, log: Optional[Path]) -> None:
        self.config = config
        self.templates = templates
        self.place = place
        self.call = call
        self.log = log
        self.attached = asyncio.Event()
        self.job_over = asyncio.Event()
        self.progress = Progress(place.start, {"job_id": call.job_id, "attempt": place.attempt})
        self.fellows: Optional[Fellows] = None
        self.job: Optional[Job] = None
        self.learned: dict[str, Any] = {"user": call.user, "node_index": call.node_index}
        self.crew: Optional[Crew] = None
        self.gate = Gate()
        self.suspension: Optional[Suspension] = None
        self.suspended = False
        self.image_held: Optional[int] = None
        self.ssh_ports: list[int] = []
        self.is_stored: Optional[bool] = None
        self.is_noted = False
        self.stand_in: Optional[StandIn] = None
        self.witness: Optional[Survivor] = None
        self.listener: Optional[socket.socket] = None
        self.script_reached: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.progress.private["user"] = call.user
        self.progress.now = self._now

    def _now(self) -> dict[str, Any]:
        return {} if self.job is None else {"members": shown(self.job, self.crew, self.ssh_ports)}

    async def run(self, listener: socket.socket) -> None:
        """The attempt's whole life; returns when nothing of it is left."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(sig, self.job_over.set)
        self._name_guests(short(os.uname().nodename))
        self.progress.stage("agent")
        for failure in undo_older(self.config.paths, self.call.job_id, self.place):
            LOGGER.error("of an earlier attempt is left: %s", failure)
        try:
            user = look_up(self.call.user)
        except VTorqueError as err:
            LOGGER.error("%s", err)
            record.note_end(self.config.paths, self.call.job_id, self.place)
            undo(self.place)
            return
        leftovers = self._leftovers(user)
        control = Control(
            self.progress, user.uid, over=self.job_over.set, attached=self.attached.set,
            joined=leftovers.join if leftovers else None, detached=self._detached, started=self._started,
            named=lambda member: self._note_member(member, user),
            orders=orders_of(
                lambda: self.crew, lambda: self.job, self.config, self.progress.fail,
                suspension=lambda: self.suspension, gate=self.gate,
            ),
        )  # fmt: skip
        self.listener = listener
        server = await control.serve(listener)
        telling = [asyncio.ensure_future(tell) for tell in (
            self._publish(user), self._report(user), self._count(),
        )]  # fmt: skip
        await self._live_and_tell(user)
        self._stand_alone()
        await self._hear_of_the_end()
        if leftovers is not None:
            await leftovers.end()
        await self._wipe()
        if self.witness is not None:
            self.witness.dismiss()
        record.note_end(self.config.paths, self.call.job_id, self.place)
        for failure in undo(self.place):
            LOGGER.error("left behind: %s", failure)
        if self.image_held is not None:
            os.close(self.image_held)
        await self._tell_of_the_end()
        self.progress.stage("gone", None if self.progress.error or self.suspended else "ended")
        await asyncio.gather(*telling, return_exceptions=True)
        server.close()
        await control.drain(LAST_ANSWER_SECONDS)

    def _detached(self, number: object, error: object) -> None:
        if self.suspension is not None:
            self.suspension.detached(number, error)

    def _note_member(self, name: object, user: User) -> None:
        """Note which member of a job array this is, once, where it has a number of its own."""
        if name is None or self.log is None or self.is_noted:
            return
        from vmgr.report.members import note  # few jobs are members

        self.is_noted = True
        note(self.log.parent, name, self.call.job_id, user.uid)

    def _started(self, error: object) -> None:
        """The job's wrapper has started the script; that of a suspended job it has within reach, or says why not."""
        if self.job is None or self.job.resumption is None:
            self.progress.stage("job started", "running")
        elif not self.script_reached.done():
            self.script_reached.set_result(error)

    def _have_a_witness(self, user: User, fellows: Fellows) -> None:
        """On a sister: if this process dies, the mother superior is told, which ends the job."""
        from vmgr.node.survivor import Survivor  # few jobs have several nodes

        async def tell() -> None:
            progress = Progress(self.place.start, {})
            progress.fail(VTorqueError("the node agent has died", code=Code.AGENT, hint="see the log of that node"))
            await fellows.tell(FAILED, progress.failure())

        self.witness = Survivor(self.config, user, self.place, self.call.job_id, role="witness")
        self.witness.call(tell)

    def _stand_alone(self) -> None:
        if self.stand_in is not None:
            self.stand_in.dismiss()

    def _leftovers(self, user: User) -> Optional[Leftovers]:
        """Where the site ends what a job leaves running on the node: what ends it."""
        if not self.config.kill_user_processes:
            return None
        from vmgr.node.leftovers import Leftovers  # psutil takes its time

        return Leftovers(self.place, user.uid)

    def _name_guests(self, node: str, names: Optional[list[str]] = None) -> None:
        names = names or [guest_name(node, 1)]
        self.progress.facts.update(node=node, guest=names[0], guests=names)

    async def _publish(self, user: User) -> None:
        """Keep the status file of the job current: the mother superior's, which knows of all nodes' failures."""
        if self.call.node_index == 0:
            path = f"{self.call.directory.directory}/{status_name(self.call.tag, self.progress.facts['node'])}"
            await publish(self.progress, user, path, timeout_s=self.config.timeouts.user_file)

    async def _report(self, user: User) -> None:
        """Keep the node's part of the job's report current, where logs are kept.

        It begins while a disk is made or a guest boots, or when all is over: loading it would hold up the start.
        """
        if self.log is not None:
            await self._come_to("pinned and running", within_s=REPORT_SECONDS)
            from vmgr.report.keep import keep

            await keep(self.progress, self.log, user.uid, self.learned)

    async def _count(self) -> None:
        """Tell the node's counts of the attempt, from when there is something to tell."""
        await self._come_to("guests ready", "ready", "failed")
        from vmgr.metrics.watch import count  # as above

        await count(self.progress, self.config.paths, self.place)

    async def _come_to(self, *stages: str, within_s: Optional[float] = None) -> None:
        """Wait for one of these stages, the attempt's last one, or the time."""

        async def wait() -> None:
            async for _ in self.progress.changes():
                if any(stage["name"] in (*stages, "gone") for stage in self.progress.stages):
                    return

        waiting = asyncio.ensure_future(wait())
        await asyncio.wait([waiting], timeout=within_s)
        waiting.cancel()

    async def _hear_of_the_end(self) -> None:
        """On the mother superior: wait until nothing is left on the other nodes.

        The record is still there, so that an epilogue that comes meanwhile ends the waiting.
        """
        if self.fellows is not None:
            await self.fellows.call_over()
            timeouts = self.config.timeouts
            problem = await self.fellows.all_gone(timeouts.vm_epilogue + timeouts.shutdown)
            if problem is not None:
                self.progress.fail(problem)

    async def _wipe(self) -> None:
        """On the mother superior: wipe the job's workspace where the site says so, now that no node uses it."""
        if self.job is None or self.job.allocation.node_index or not self.config.workspace.wipe or self.suspended:
            return
        path = self.job.stands_for.workspace
        if path is not None and not self.is_stored:
            try:
                await wipe_workspace(self.config, self.job.user, path)
            except VTorqueError as err:
                LOGGER.warning("%s", err)

    async def _tell_of_the_end(self) -> None:
        """On a sister: tell that nothing is left here."""
        if self.fellows is not None:
            if not self.fellows.leads:
                await self.fellows.tell(GONE, self.progress.failure())
            await self.fellows.close()

    async def _live_and_tell(self, user: User) -> None:
        """Live; after a failure stay for as long as the job, so that its wrapper learns the reason."""
        try:
            await self._live(user)
            return
        except VTorqueError as err:
            problem = err
        except Exception as err:
            LOGGER.exception("fault")
            problem = VTorqueError(f"fault in the node agent: {err}", code=Code.INTERNAL)
        is_put_back = await self._is_put_back(problem, user)
        self._stand_alone()
        if is_put_back:
            await self.job_over.wait()
            return
        self.progress.fail(problem)
        if self.fellows is not None:
            if self.fellows.leads:
                await self.fellows.call_over()
            else:
                await self.fellows.tell(FAILED, self.progress.failure())
        try:
            await first(self._unattended(), self.job_over.wait())
        except VTorqueError as err:
            LOGGER.error("%s", err)

    async def _is_put_back(self, problem: VTorqueError, user: User) -> bool:
        """On the mother superior: whether a job that was suspended, and has not gone on, waits again to be released."""
        if self.call.node_index or self.is_stored is False:
            return False
        if self.job_over.is_set() or self.progress.error is not None:
            return False
        from vmgr.node.returning import means_of, put_back  # few jobs go on

        try:
            means = means_of(self.config, user, self.call.job_id, self.attached, self.job_over, self.fellows)
            self.suspended = await put_back(means, self.progress, problem, is_stored=self.is_stored)
        except Exception:
            LOGGER.exception("fault")
        return self.suspended

    async def _unattended(self) -> None:
        """Raise VTorqueError (VT-AGENT) when no job wrapper comes in time: its job is over, or never was one.

        Wherever the batch system's epilogue is lost, this and the end of the wrapper's connection end the guest. To a
        sister no wrapper comes: there the batch system's own file says how long the job lives.
        """
        limit = self.config.timeouts.attach
        if self.call.node_index == 0:
            await first(self.attached.wait(), asyncio.sleep(limit))
            if not self.attached.is_set():
                raise VTorqueError(f"no job has come for the guest within {limit} s", code=Code.AGENT)
        await asyncio.Event().wait()

    async def _live(self, user: User) -> None:
        """Boot the guests, wait for the end of the job, shut the guests down."""
        call, timeouts = self.call, self.config.timeouts
        allocation = await allocation_of(call, self.place.attempt, timeout_s=timeouts.boot)
        self._name_guests(allocation.name)
        self.learned.update(key=allocation.key, node_index=allocation.node_index)
        self.learned["nodes"] = list(allocation.nodes[:1] if allocation.node_index else allocation.nodes)
        self.fellows = fellows = Fellows(call.directory.directory, allocation, user, timeout_s=timeouts.user_file)
        if not fellows.leads:
            self._have_a_witness(user, fellows)
        watchers = [asyncio.ensure_future(self._note_over(fellows.over()))]
        if len(allocation.nodes) > 1 and call.task_file is not None:
            watchers.append(asyncio.ensure_future(self._note_over(over(call.task_file, allocation.key))))
        try:
            job, self.image_held = await checked_job(
                call, self.config, self.place, user, allocation, stored=lambda there: self._note_stored(there, user)
            )
            self.job = job
            self._name_guests(allocation.name, [member.name for member in job.own])
            self.learned["first_rank"] = allocation.node_index * job.group.per_node
            self.progress.private.update(
                spec=as_plain(job.spec), directory=call.directory.directory,
                nodes=allocation.nodes, image=job.image.reference, resumed=job.resumption is not None,
            )  # fmt: skip
            LOGGER.info("%simage %s", "suspended, goes on; " if job.resumption else "", job.image.reference)
            if job.spec.disk is not None and fellows.leads:
                from vmgr.node.datadisk import disk_path  # few jobs have one

                self.progress.facts["disk"] = disk_path(job.spec, call.job_id)
            self.progress.stage("spec", "staging")
            with ExitStack() as logs_of_consoles:
                await self._live_with(job, fellows, logs_of_consoles)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    def _note_stored(self, is_stored: bool, user: User) -> None:
        self.is_stored = is_stored
        if self.call.node_index or self.config.suspended.folder is None or self.listener is None:
            return
        if self.stand_in is None:
            from vmgr.node.standin import StandIn  # few jobs can be suspended

            self.stand_in = StandIn(self.config, user, self.place, self.call.job_id, self.listener)
        if is_stored:
            self.stand_in.call()
        else:
            self.stand_in.dismiss()

    async def _note_over(self, ending: Coroutine[Any, Any, None]) -> None:
        await ending
        self.job_over.set()

    async def _live_with(self, job: Job, fellows: Fellows, open_logs: ExitStack) -> None:
        """The guests' lives, from their boot to their end."""
        timeouts = self.config.timeouts

        def console_log(name: str) -> Optional[BinaryIO]:
            return open_logs.enter_context(self._console_log(name))

        crew = await self._boot(job, console_log)
        if crew is None:
            return
        self.crew = crew
        try:
            if job.spec.suspend:
                from vmgr.node.suspendable import suspension_of  # few jobs can be

                self.suspension = suspension_of(
                    job,
                    self.call.directory.sha256,
                    crew,
                    fellows,
                    self.config,
                    self.progress,
                    self.gate,
                    self.stand_in,
                )
            await first(self._ready(job, crew, fellows), fellows.failure(), self.job_over.wait())
            if not self.job_over.is_set():
                self.progress.stage("ready", "ready")
                asyncio.get_running_loop().run_in_executor(None, _reap, self.config)
                ends = [*(guest.died() for guest in crew.guests), fellows.failure(), self._unattended()]
                if self.suspension is not None:
                    ends.append(self.suspension.run())
                if job.resumption is not None and fellows.leads:
                    ends.append(self._let_go_on(job, job.resumption))
                await first(*ends, self.job_over.wait())
            if await self._is_suspended():
                return
            self.progress.stage("job ended", "ending")
            if self.call.nodes is not None and not fellows.leads:
                with suppress(OSError):
                    record.append(self.place, {"do": "over"})
            await fellows.call_over()
            if not await self._is_still_stored(job):
                await all_of(*(guest.shut_down(timeouts) for guest in crew.guests))
        except VTorqueError as err:
            if await self._is_suspended():  # the batch system has ended more of it than was asked for
                return
            if not self.is_stored:  # else the job may go back to where it was
                self.progress.fail(err)
            raise
        finally:
            self.crew = None
            if not self.suspended:  # else it says so, whoever asks
                self.suspension = None
            await crew.kill()

    async def _is_still_stored(self, job: Job) -> bool:
        """Whether the job's next start goes on from where this one did.

        Its guests are not shut down then: nothing of theirs, such as a script that ends, is to change what its shares
        hold. A sister learns from the store whether the mother superior has taken the job over.
        """
        if job.resumption is None or job.allocation.node_index == 0:
            return bool(self.is_stored)
        try:
            found = await job.resumption.stored.find(job.job_id)
        except (VTorqueError, OSError) as err:
            LOGGER.warning("%s", err)
            return False
        return found is not None and found[0] == job.resumption.entry

    async def _is_suspended(self) -> bool:
        """Whether the attempt ends because its job is suspended; what has been begun of that is ended."""
        if self.suspension is not None and await self.suspension.settle():
            self.suspended = True
            if self.progress.state != "suspended":  # a sister, or a failure that is none
                self.progress.stage("suspended", "suspended")
        return self.suspended

    async def _boot(self, job: Job, console_logs: ConsoleLogs) -> Optional[Crew]:
        """The node's running guests; None when the job was over before: what is copied for a guest takes its time."""
        booting = asyncio.ensure_future(boot(job, self.config, self.templates, self.progress, console_logs))
        over = asyncio.ensure_future(self.job_over.wait())
        try:
            await asyncio.wait([booting, over], return_when=asyncio.FIRST_COMPLETED)
            return await booting if booting.done() else None
        finally:
            for task in (booting, over):
                task.cancel()
            await asyncio.gather(booting, over, return_exceptions=True)

    async def _ready(self, job: Job, crew: Crew, fellows: Fellows) -> None:
        """Return when the guests of this node, and on the mother superior those of all nodes, are ready."""
        boot_s = self.config.timeouts.boot
        introducing = [self._introduce(job, crew, fellows, boot_s)] if job.network.kind == "bridge" else []
        await every(*(guest.ready(boot_s) for guest in crew.guests), *introducing)
        self.ssh_ports = await crew.open_ssh()
        self.progress.private["ssh"] = {"port": self.ssh_ports[0], "host_key": crew.host_key.public}
        self.progress.facts["ssh_ports"] = crew.ssh_ports()
        image = job.image.reference
        await fellows.tell(
            READY, {"ssh_ports": crew.ssh_ports(), "resumed": told(job.resumption), "image": image}
        )  # fmt: skip
        if len(job.allocation.nodes) > 1:
            self.progress.stage("guests ready")
            try:
                all_said = await asyncio.wait_for(fellows.all_ready(), boot_s)
            except asyncio.TimeoutError:
                raise VTorqueError(f"not all nodes were ready {boot_s} s after this one", code=Code.BOOT) from None
            names, per_node = job.names, len(crew.guests)
            for node, data in enumerate(all_said):
                check_image(image, job.allocation.nodes[node], data.get("image"))
                check_alike(job.resumption, job.allocation.nodes[node], data.get("resumed"))
                own = names[node * per_node : (node + 1) * per_node]
                self.progress.facts["ssh_ports"].update(parse_ssh_ports(data, own))

    async def _let_go_on(self, job: Job, found: Resumption) -> None:
        """On the mother superior: let the script go on when its wrapper has it within reach, and nothing is stored of
        the job any more. Raises VTorqueError: VT-CONNECT when it is not within reach, and as `_take_over`.
        """
        error = await self.script_reached
        if error is not None:
            raise VTorqueError(printable(str(error)[:MAX_REASON]), code=Code.CONNECT)
        await self._take_over(job, found)
        self._stand_alone()
        self.progress.stage("job started", "running")
        await asyncio.Event().wait()

    async def _take_over(self, job: Job, found: Resumption) -> None:
        """Have the job be this attempt's alone: nothing of it is stored any more, and its workspace ends with it.

        Its script has not gone on yet, so that the job's next start can try again when this fails.
        """
        await found.stored.drop(job.job_id)  # what others have left takes its time
        claiming = asyncio.ensure_future(found.stored.claim(job.job_id))
        try:
            await asyncio.wait([claiming])
        finally:  # it is known, also when this is given up
            await asyncio.wait([claiming])
            self.is_stored = claiming.exception() is not None or not claiming.result()
        if not claiming.result():
            raise VTorqueError(
                "what was stored of the job has been deleted meanwhile", code=Code.SUSPEND,
                hint="it starts from its beginning when it is released",
            )  # fmt: skip
        if job.stands_for.workspace is not None and self.config.workspace.wipe:
            keep_workspace(self.place, job.user, job.stands_for.workspace, kept=False)
        try:
            await found.stored.remove(job.job_id)
        except VTorqueError as err:
            LOGGER.warning("%s", err)

    async def _introduce(self, job: Job, crew: Crew, fellows: Fellows, timeout_s: float) -> None:
        """Tell the guests of this node where all guests of the job are, once all of them have said so.

        Raises VTorqueError (VT-BOOT) when they have not in time.
        """

        async def exchange() -> list[str]:
            return await fellows.exchange(await crew.addresses())

        try:
            addresses = await asyncio.wait_for(exchange(), timeout_s)
        except asyncio.TimeoutError:
            raise VTorqueError(f"not all guests told their addresses within {timeout_s} s", code=Code.BOOT) from None
        for guest in crew.guests:
            guest.send_hosts(zip(addresses, job.names))

    @contextmanager
    def _console_log(self, guest: str) -> Iterator[Optional[BinaryIO]]:
        if self.log is None:
            yield None
            return
        number = guest.rpartition("-")[2]
        path = self.log.with_suffix(".console" if number == "1" else f".{number}.console")
        try:
            stream = os.fdopen(logs.open_for(path, _uid(self.call.user), truncate=True), "wb", buffering=0)
        except OSError as err:
            LOGGER.warning("the console is not logged: %s", err)
            yield None
            return
        with stream:
            yield stream
