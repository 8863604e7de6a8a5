"""`vmgr`: looks after images, guests and nodes. This module only gathers the commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Optional

import click

from vmgr import __version__
from vmgr.commands import (
    build,
    completion,
    config,
    configimport,
    console,
    doctor,
    dump,
    guests,
    imagechange,
    images,
    logs,
    metrics,
    nodes,
    power,
    reached,
    reference,
    report,
    save,
    ssh,
    suspend,
    table,
    topology,
)
from vmgr.errors import Code, VTorqueError, printable


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vmgr")
@click.option("--debug", is_flag=True, help="Show where in the program a failure came from.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Look after images, guests and nodes of vTorque.

    Example: vmgr list
    """
    context.obj = debug


cli.add_command(images.list_images)
cli.add_command(images.image)
images.image.add_command(build.build)
images.image.add_command(save.save)
cli.add_command(imagechange.add)
cli.add_command(imagechange.update)
cli.add_command(reference.show)
cli.add_command(reference.delete)
cli.add_command(guests.ps)
cli.add_command(guests.top)
cli.add_command(ssh.ssh)
cli.add_command(ssh.exec_)
cli.add_command(ssh.cp)
cli.add_command(console.console)
cli.add_command(power.power)
cli.add_command(dump.dump)
cli.add_command(suspend.suspend)
cli.add_command(suspend.resume)
cli.add_command(logs.logs)
cli.add_command(report.report)
cli.add_command(reached.agent_states)
cli.add_command(reached.agent_link)
cli.add_command(nodes.node)
cli.add_command(doctor.doctor)
cli.add_command(metrics.metrics)
cli.add_command(topology.topology)
cli.add_command(config.config)
config.config.add_command(configimport.import_)
cli.add_command(table.errors)
cli.add_command(completion.completion)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run `vmgr`; gives its exit status. A failure is one line on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    if completion.VARIABLE in os.environ:
        completion.complete_names(cli)
    try:
        result = cli.main(args=arguments, prog_name="vmgr", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except VTorqueError as err:
        if "--debug" in arguments:
            raise
        print(err, file=sys.stderr)
        return err.code.status
    except click.ClickException as err:
        err.show()
        return 2
    except click.Abort:
        print("vmgr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has seen enough
        _drop_output()
        return 1
    except Exception as err:
        if "--debug" in arguments:
            raise
        print(_told(err), file=sys.stderr)
        if isinstance(err, OSError):  # perhaps of standard output, which would fail once more at the end
            _drop_output()
        return Code.INTERNAL.status


def _told(err: Exception) -> str:
    """A failure that nobody expected, as one line: a file's by its reason, any other as a fault of ours."""
    if isinstance(err, OSError) and err.strerror:
        where = f"{os.fsdecode(err.filename)}: " if isinstance(err.filename, (str, bytes)) else ""
        return f"vmgr: {printable(where)}{err.strerror}"
    return str(VTorqueError(f"{type(err).__name__}: {err}", code=Code.INTERNAL, hint="vmgr --debug … shows where"))


def _open_streams() -> None:
    """Lead standard streams that are closed to nothing: else a file that is opened could be taken for one of them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the end


def _drop_output() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
