"""The `vmgr image` commands that change the pool, check it, and take a disk out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import click

from vmgr.commands.access import need_root
from vmgr.commands.images import image, site_pool
from vmgr.commands.progress import Shown
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation

if TYPE_CHECKING:
    from vmgr.images.pool import Image


def _suspended_uses(config: Config) -> list[tuple[str, str]]:
    from vmgr.suspended.listing import suspended_uses  # most commands do without

    return suspended_uses(config, lambda problem: click.echo(str(problem), err=True))


USES: list[Callable[[Config], list[tuple[str, str]]]] = [_suspended_uses]
"""What beside running jobs uses images: each gives `NAME@REVISION`, and in words what it is."""

_CHANGES = (
    click.option("--description", help="What it is for."),
    click.option("--family", help="Guest family, whose templates it is booted with."),
    click.option("--distro", help="Distribution, which users can ask for with -vm distro=."),
    click.option("--min-ram", metavar="SIZE", help="Least RAM of a guest, such as 512M."),
    click.option(
        "--feature", "features", multiple=True, metavar="NAME", help="What it can do: 9p, virtiofs, nfs, …; repeatable."
    ),
)
_DISK = (
    click.option("--format", "form", metavar="NAME", help="The disk's format, where its header tells none: raw."),
    click.option("--convert", is_flag=True, help="Make a qcow2 disk of it, whatever it is."),
)
_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@image.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the image in the pool (default: that of FILE without its ending).")
@click.option("--like", metavar="IMAGE", help="Image whose kernel, initial RAM disk, family and features it goes with.")
@_options(*_CHANGES, *_DISK)
@_json
def add(
    file: Path, name: Optional[str], like: Optional[str], form: Optional[str], convert: bool, as_json: bool, **wish: Any
) -> None:
    """Add a disk to the pool, as a new image or revision.

    FILE is qcow2 or raw; with --convert VMDK, VDI and VHDX too. It must stand alone, without a backing file. Without
    --like it boots from itself (BIOS) and needs --family.

    Example: vmgr image add disk.qcow2 --name my-debian --like debian-12
    """
    from vmgr.images.add import add_disk

    need_root("vmgr image add changes the pool, which belongs to root")
    made = add_disk(
        _given(file, form, convert),
        name if name is not None else file.stem,
        _wish(**wish),
        like=like,
        pool=site_pool(),
        templates=installation().templates,
        report=Shown(),
    )
    _show_made(made, as_json=as_json)


@image.command()
@click.argument("name", metavar="IMAGE")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_options(*_CHANGES, *_DISK)
@_json
def update(name: str, file: Optional[Path], form: Optional[str], convert: bool, as_json: bool, **wish: Any) -> None:
    """Make a new revision of an image.

    It has the disk FILE, or the same files and another description.

    Example: vmgr image update my-debian --description "with our compilers"
    """
    from vmgr.images.add import update_image

    need_root("vmgr image update changes the pool, which belongs to root")
    if file is None and (form is not None or convert):
        raise VTorqueError("--format and --convert are for a disk, and no FILE is given", code=Code.USAGE)
    made = update_image(
        name,
        _wish(**wish),
        None if file is None else _given(file, form, convert),
        pool=site_pool(),
        templates=installation().templates,
        report=Shown(),
    )
    _show_made(made, as_json=as_json)


def _show_made(made: Image, *, as_json: bool) -> None:
    """Say which revision was made; for programs where it lies as well."""
    told = {"image": made.reference, "directory": made.folder}
    click.echo(json.dumps(told) if as_json else made.reference)


def _given(file: Path, form: Optional[str], convert: bool) -> Any:
    from vmgr.images.add import Given
    from vmgr.images.header import FOREIGN, FORMATS

    if form is not None and form not in (*FORMATS, *FOREIGN):
        raise VTorqueError(
            f"--format {form} is not known", code=Code.USAGE, hint=f"known: {', '.join((*FORMATS, *FOREIGN))}"
        )
    return Given(file, load_config(installation()).images.max_virtual_size << 20, form, convert)


def _wish(
    description: Optional[str],
    family: Optional[str],
    distro: Optional[str],
    min_ram: Optional[str],
    features: tuple[str, ...],
) -> Any:
    from vmgr.images.add import Wish
    from vmgr.units import parse_size_mib

    ram = parse_size_mib(min_ram) if min_ram is not None else None
    if min_ram is not None and not ram:
        raise VTorqueError(f"--min-ram {min_ram} is no size", code=Code.USAGE, hint="a size such as 512M is needed")
    return Wish(description, family, distro, ram, features or None)


@image.command()
@click.argument("old", metavar="IMAGE")
@click.argument("new", metavar="NAME")
@_json
def rename(old: str, new: str, as_json: bool) -> None:
    """Give an image, all revisions of it, another name.

    One in use is refused.

    Example: vmgr image rename my-debian lab-debian
    """
    from vmgr.images.removing import rename as rename_image

    need_root("vmgr image rename changes the pool, which belongs to root")
    config = load_config(installation())
    rename_image(
        site_pool(), old, new, also_used_by=_uses(config), name_of=_name_of(config), progress=Shown().line
    )  # fmt: skip
    click.echo(json.dumps({"image": new, "was": old}) if as_json else new)


@image.command()
@click.argument("name", metavar="IMAGE[@REVISION]")
@click.option("--force", is_flag=True, help="Delete it in use as well, and say what that breaks.")
@_json
def delete(name: str, force: bool, as_json: bool) -> None:
    """Delete a revision of an image, or all of them.

    NAME@REVISION is one revision, NAME the image with all of its revisions. One in use is refused.

    Example: vmgr image delete my-debian@1
    """
    from vmgr.images.removing import delete as delete_image

    need_root("vmgr image delete changes the pool, which belongs to root")
    config = load_config(installation())
    removed = delete_image(
        site_pool(), name, force=force,
        also_used_by=_uses(config), name_of=_name_of(config), progress=Shown().line,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"gone": removed.gone, "uses": removed.uses}, indent=1))
        return
    for use in removed.uses:
        click.echo(f"was in use: {use}", err=True)
    for reference in removed.gone:
        click.echo(f"deleted {reference}")


@image.command()
@click.argument("names", metavar="IMAGE[@REVISION]...", nargs=-1)
@_json
@click.pass_context
def verify(context: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Compare the files of images with their SHA-256.

    Without a name those of all images. Ends with 1 when one differs.

    Example: vmgr image verify debian-12
    """
    from vmgr.images.verify import verify as verify_images

    good, wrong = verify_images(site_pool(), names, Shown())
    if as_json:
        click.echo(json.dumps({"good": good, "wrong": wrong}, indent=1))
    else:
        for reference in good:
            click.echo(f"{reference}: ok")
        for line in wrong:
            click.echo(line)
    context.exit(1 if wrong else 0)


@image.command()
@click.option("--keep", type=click.IntRange(min=1), default=2, show_default=True, help="Newest revisions that stay.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_json
def gc(keep: int, dry_run: bool, as_json: bool) -> None:
    """Delete old revisions that nobody uses.

    What interrupted commands have left in the pool goes as well.

    Example: vmgr image gc --keep 3 --dry-run
    """
    from vmgr.images.removing import collect

    need_root("vmgr image gc changes the pool, which belongs to root")
    config = load_config(installation())
    removed = collect(
        site_pool(), keep=keep, dry_run=dry_run, also_used_by=_uses(config), name_of=_name_of(config)
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "gone": removed.gone, "stays": removed.uses}, indent=1))
        return
    for use in removed.uses:
        click.echo(f"stays: {use}", err=True)
    for each in removed.gone:
        click.echo(f"would delete {each}" if dry_run else f"deleted {each}")


@image.command()
@click.argument("name", metavar="IMAGE[@REVISION]")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@_json
def export(name: str, file: Path, force: bool, as_json: bool) -> None:
    """Write the disk of an image to a file.

    FILE is one qcow2 disk, sparse, that stands alone.

    Example: vmgr image export debian-12 /tmp/debian.qcow2
    """
    from vmgr.images.export import export as export_image

    made = export_image(site_pool(), name, file, force=force, report=Shown())
    told = {"image": made.reference, "file": os.fspath(file.absolute()), "bytes": file.stat().st_size}
    click.echo(json.dumps(told) if as_json else f"{made.reference}: {file}")


def _uses(config: Config) -> list[tuple[str, str]]:
    return [use for uses in USES for use in uses(config)]


def _name_of(config: Config) -> Callable[[int], str]:
    """What names the processes that hold an image: an agent by its job."""
    from vmgr.node import record

    agents = {
        step.get("pid"): place.folder.parent.name
        for place in record.places(config.paths)
        for step in record.steps(place)
        if step.get("role") == "agent"
    }

    def name_of(pid: int) -> str:
        return f"job {agents[pid]}" if pid in agents else f"process {pid}"

    return name_of
