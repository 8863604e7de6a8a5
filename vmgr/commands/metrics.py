"""`vmgr metrics`."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Optional

import click

from vmgr.config import Config, Paths, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation

PORT = 9779


@click.command()
@click.option("--textfile", type=click.Path(path_type=Path), help="Write them to this file, which changes at once.")
@click.option("--listen", metavar="[ADDRESS]:PORT", help="Serve them by HTTP until ended; without ADDRESS on loopback.")
def metrics(textfile: Optional[Path], listen: Optional[str]) -> None:
    """Tell Prometheus what this node does and has done; needs root.

    Without an option the metrics are printed. --textfile is for the textfile collector of the node exporter, --listen
    for a Prometheus that asks the nodes themselves: http://ADDRESS:PORT/metrics.

    Example: vmgr metrics --textfile /var/lib/node_exporter/vtorque.prom
    """
    if textfile is not None and listen is not None:
        raise VTorqueError("--textfile and --listen do not go together", code=Code.USAGE, hint="choose one")
    address = None if listen is None else parse_address(listen)
    if textfile is not None and textfile.suffix != ".prom":
        raise VTorqueError(
            f"--textfile {textfile}: a name that ends with .prom is needed", code=Code.VALUE,
            hint="the node exporter reads no others",
        )  # fmt: skip
    if os.geteuid() != 0:
        raise VTorqueError("vmgr metrics reads root's records", code=Code.ACCESS, hint="run it as root")
    config = load_config(installation())
    if address is not None:
        asyncio.run(_serve(config, *address))
        return
    try:
        page = asyncio.run(_page(config))
        if textfile is None:
            click.echo(page.decode(), nl=False)
        else:
            write_whole(config.paths, textfile, page)
    except OSError as err:
        if textfile is None:
            raise
        raise VTorqueError(
            f"--textfile {textfile} cannot be written: {err.strerror}", code=Code.ACCESS, hint="is its folder there?"
        ) from err


async def _page(config: Config) -> bytes:
    from vmgr.metrics import store
    from vmgr.metrics.families import text
    from vmgr.metrics.live import look

    return text(store.read(config.paths), await look(config))


async def _serve(config: Config, host: str, port: int) -> None:
    from vmgr.metrics.serve import Server

    over = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, over.set)

    def complain(line: str) -> None:
        click.echo(f"vmgr: {line}", err=True)

    try:
        server = await Server(lambda: _page(config), complain).listen(host, port)
    except OSError as err:
        reason = (
            os.strerror(err.errno) if err.errno and err.errno > 0 else err.strerror or err
        )  # asyncio says it at length
        raise VTorqueError(f"--listen {host}:{port}: {reason}", code=Code.VALUE, hint="name another") from err
    shown = ", ".join(f"{each.getsockname()[0]}:{each.getsockname()[1]}" for each in server.sockets)
    click.echo(f"vmgr: /metrics on {shown}", err=True)
    async with server:
        await over.wait()


def parse_address(text: str) -> tuple[str, int]:
    """Address and port of `ADDRESS:PORT`, `[IPV6]:PORT`, `:PORT` or `PORT`. Raises VTorqueError (VT-VALUE)."""
    import ipaddress

    from vmgr.units import parse_count

    host, colon, port_text = text.rpartition(":")
    port = parse_count(port_text)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = str(ipaddress.ip_address(bare)) if colon and bare else "127.0.0.1"
        if port is None or not port <= 65535 or (":" in bare and bare == host):
            raise ValueError
    except ValueError:
        raise VTorqueError(
            f"--listen {text}: an address of this machine and a port are needed", code=Code.VALUE,
            hint=f"such as :{PORT}, 10.1.1.4:{PORT} or [::1]:{PORT}",
        ) from None  # fmt: skip
    return address, port


def write_whole(paths: Paths, path: Path, data: bytes) -> None:
    """Write a file for everybody to read, and put it into its place at once. Raises OSError.

    One process of the node does so at a time: what is found under the temporary name was left by one that died.
    """
    from vmgr.node.record import node_lock

    temporary = path.with_name(f".{path.name}.new")
    with node_lock(paths, "metrics"):
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with open(fd, "wb") as stream:
                os.fchmod(fd, 0o644)
                stream.write(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
