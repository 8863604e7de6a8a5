"""`vmgr`: looks after images, guests and nodes. This module only gathers the commands."""

from __future__ import annotations

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
    table,
    topology,
)
from vmgr.errors import VTorqueError


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
cli.add_command(logs.logs)
cli.add_command(report.report)
cli.add_command(reached.agent_states)
cli.add_command(reached.agent_link)
cli.add_command(nodes.node)
cli.add_command(doctor.doctor)
cli.add_command(metrics.metrics)
cli.add_command(topology.topology)
cli.add_command(config.config)
cli.add_command(table.errors)
cli.add_command(completion.completion)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run `vmgr`; gives its exit status. A failure is one line on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
