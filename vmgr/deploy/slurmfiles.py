"""What Slurm needs of a site: our programs, and the lines of `slurm.conf` that name them.

Pure, and with nothing but the standard library, as `hookfiles`, whose `fill` fills the places in. Facts from
slurm.conf(5): `Prolog` and `Epilog` are paths, or patterns of glob(7) for several of them, `TaskProlog` is a path,
`PrologFlags` a list.
"""

from __future__ import annotations

HOOKS = ("prolog", "epilog", "task_prolog")
"""The files of `mom_priv_hooks/slurm`, installed with the mode of the hooks in `hookfiles`."""

MODE = "slurm"
"""Stands for the mode of the hooks of a node of Slurm's: nothing lies on it but the programs."""

HOME = "/var/spool"
"""The folder of a node in which the manifest's own lies, where TORQUE would have its home."""

FLAGS = ("Alloc", "DeferBatch")
"""`Alloc`: a Prolog runs on every node of a job, at its start. `DeferBatch`: the batch script begins after the last."""


def conf_lines(folder: str) -> tuple[str, ...]:
    """The lines of `slurm.conf` for hooks in `folder`."""
    return (
        f"Prolog={folder}/prolog",
        f"Epilog={folder}/epilog",
        f"TaskProlog={folder}/task_prolog",
        f"PrologFlags={','.join(FLAGS)}",
    )
