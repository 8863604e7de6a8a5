"""What `vsub --help` prints."""

from __future__ import annotations

from vmgr.request import KEYS

_HEAD = """\
usage: vsub [options of qsub] [-vm KEY=VALUE[,KEY=VALUE...]]... [SCRIPT]
       vsub -I [options of qsub] [-vm ...]... [-x SCRIPT]
       vsub ... --slurm [options of sbatch] [SCRIPT [ARGUMENT...]]   (on Slurm)

Submits a batch job as qsub does; the job's script runs inside a virtual machine
made from the site's defaults and what -vm asks for. SCRIPT is read from standard
input when it is not given; its lines "#PBS -vm ..." count as well. With -I the
terminal ends up in a shell in the guest, or runs SCRIPT there with -x.

"""
_TAIL = """\
  --wait             follow the job, wait for its end, exit with its status
  --explain          print each value and where it comes from; submit nothing
  --dry-run          print the command line and every file; submit nothing (-gf)
  --json             print what is for programs as JSON
  --slurm WORD...    on Slurm: options of sbatch, then SCRIPT and its arguments
  --debug            say what is done; show the traceback of a fault
  --version, --help

Prints the job's id. Ends with 2 when a request is refused (nothing is submitted
then), else with qsub's status. All other options are qsub's: man qsub.
"""


def help_text() -> str:
    """The help, with every key of `-vm`."""
    lines = ["  -vm off            submit to qsub untouched: no guest\n"]
    for name, key in KEYS.items():
        word = f"-vm {name}={'FILE' if key.is_file else 'VALUE'}"
        gap = " " * max(1, 19 - len(word)) if len(word) < 19 else f"\n{' ' * 21}"
        lines.append(f"  {word}{gap}{key.help}\n")
    return _HEAD + "".join(lines) + _TAIL
