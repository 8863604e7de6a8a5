"""Whether what lies in the pool is what was put there."""

from __future__ import annotations

from collections.abc import Sequence

from vmgr.errors import VTorqueError
from vmgr.images.pool import HOLD, SIDECAR, Image, Pool, split_reference
from vmgr.images.report import Report
from vmgr.images.writing import digest


def verify(pool: Pool, references: Sequence[str], report: Report) -> tuple[list[str], list[str]]:
    """Read all files of the images named, of all when none is, and compare them with what image.yaml says.

    A name alone stands for all of its revisions. Gives the revisions that are as they should be, and a line for each
    thing that is not. Raises VTorqueError (VT-IMAGE) for a name that no image has.
    """
    good, wrong = [], []
    for name, revision in _named(pool, references):
        reference = f"{name}@{revision}"
        try:
            image = pool.get(name, revision)
            problems = [*_differences(image, report), *_orphan(pool, image)]
        except (VTorqueError, OSError) as err:
            if revision not in pool.revisions(name):
                continue  # deleted meanwhile
            problems = [err.message if isinstance(err, VTorqueError) else f"{err.filename}: {err.strerror}"]
        wrong += [f"{reference}: {problem}" for problem in problems]
        good += [] if problems else [reference]
    return good, wrong


def _named(pool: Pool, references: Sequence[str]) -> list[tuple[str, int]]:
    found = []
    for reference in references or pool.names():
        name, revision = split_reference(reference)
        revisions = pool.revisions(name)
        if references and (not revisions or (revision or revisions[-1]) not in revisions):
            pool.get(reference)
        found += [(name, each) for each in revisions if revision in (None, each)]
    return found


def _differences(image: Image, report: Report) -> list[str]:
    problems = []
    there = {path.name for path in image.directory.iterdir()} - {SIDECAR, HOLD}
    problems += [f"{name} is missing" for name in sorted(set(image.files) - there)]
    problems += [f"{name} is there and not in {SIDECAR}" for name in sorted(there - set(image.files))]
    for name in sorted(there & set(image.files)):
        path, said = image.directory / name, image.files[name]
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is no file")
            continue
        size = path.stat().st_size
        if size != said.get("size"):
            problems.append(f"{name} has {size} bytes, not {said.get('size')}")
            continue
        with report.bar(f"{image.reference}: {name}", size) as advance:
            found = digest(path, advance)["sha256"]
        if found != said.get("sha256"):
            problems.append(f"{name} has the SHA-256 {found[:16]}…, not {str(said.get('sha256'))[:16]}…")
    return problems


def _orphan(pool: Pool, image: Image) -> list[str]:
    if image.parent is None:
        return []
    name, revision = split_reference(image.parent)
    return [] if revision in pool.revisions(name) else [f"the image {image.parent}, on which it is a layer, is missing"]
