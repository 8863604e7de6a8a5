"""What a guest job asks of Slurm for its guests, beside what its user says: how it lies on nodes, and its comment.

Pure, as `slurmtranslate`, whose values these are.
"""

from __future__ import annotations

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmrequest import Layout
from vsub.engines.slurmtranslate import Translated, Value

MAX_COMMENT_BYTES = 1024
"""What reaches a Prolog of a job's comment."""
COMMENT = "vtorque:"


def layout_options(lies: Layout, found: Translated, source: str, mem_source: str, *, one_task: bool) -> Translated:
    """The options that ask for a layout, beside those `found`; `one_task`: one task on each node, with all processors.

    `mem_source` is where the memory comes from, `source` everything else. Raises VTorqueError (VT-OPTION) for features
    that cannot be joined with a `--constraint`.
    """
    tasks, cpus = (1, lies.tasks * lies.cpus) if one_task else (lies.tasks, lies.cpus)
    wanted = {"nodes": Value(str(lies.nodes), source), "ntasks-per-node": Value(str(tasks), source)}
    if cpus > 1 or one_task:
        wanted["cpus-per-task"] = Value(str(cpus), source)
    if lies.mib is not None:
        wanted["mem"] = Value(f"{lies.mib}M", mem_source)
    if lies.hosts:
        wanted["nodelist"] = Value(",".join(lies.hosts), source)
    if lies.features:
        wanted["constraint"] = Value("&".join((*lies.features, *_plain_features(found))), source)
    return wanted


def check_nodelist(found: Translated, nodes: int) -> None:
    """Refuse a `--nodelist` of more nodes than the job has, whose refusal by sbatch tells of neither.

    Raises VTorqueError (VT-OPTION, VT-USAGE).
    """
    asked = found.get("nodelist")
    text = "" if asked is None else asked.text or ""
    if asked is None or "/" in text:  # a file of names, which sbatch reads
        return
    from vmgr.node.nodelist import expand  # few jobs name their nodes

    try:
        number = len(expand(text))
    except ValueError:
        raise VTorqueError(
            f"--nodelist={text[:80]} ({asked.source}) is no list of nodes", code=Code.USAGE, hint="such as n1,n[3-5]"
        ) from None
    if number > nodes:
        raise VTorqueError(
            f"--nodelist={text[:80]} ({asked.source}) names {number} nodes, and the job has {nodes}",
            code=Code.OPTION,
            hint=f"say --nodes={number}",
        )


def _plain_features(found: Translated) -> list[str]:
    """The features of a `--constraint` that asks for all of them. Raises VTorqueError (VT-OPTION) for another."""
    asked = found.get("constraint")
    features = (asked.text or "").split("&") if asked is not None else []
    if not all(feature.replace("_", "").replace("-", "").replace(".", "").isalnum() for feature in features):
        raise VTorqueError(
            f"the constraint {asked.text if asked else ''!r} ({asked.source if asked else ''}) cannot be joined with "
            "the features in nodes=",
            code=Code.OPTION,
            hint="say all of it by --constraint",
        )
    return features


def comment_option(directory: str, found: Translated) -> Value:
    """The comment that carries the job directory, with the user's own behind it. Raises VTorqueError (VT-VALUE)."""
    own = found.get("comment")
    text = f"{COMMENT}{directory}" + (f" {own.text}" if own is not None and own.text else "")
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > MAX_COMMENT_BYTES:
        raise VTorqueError(
            f"the comment ({own.source if own else 'of the job'}) is too long: with the job directory it has {size} "
            "bytes",
            code=Code.VALUE,
            hint=f"{MAX_COMMENT_BYTES} is allowed",
        )
    return Value(text, own.source if own else "vsub")
