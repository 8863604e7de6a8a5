"""Command lines of vsub, each with what must come of it: qsub's arguments, the specification, status and messages.

In what is expected `DIR` is the job directory, `PREFIX` the installation, `<home>` the user's home, `<work>` the folder
`work` in it, where the user is, `<config>` the configuration's file, `<pool>` the images, `<qsub>` the batch system's
program. A row without `config` belongs to a site with the images micro (the default) and debian-12, up to 8 vCPUs
and 4 GiB.

Facts of TORQUE's own reading (src/cmds/qsub_functions.c, src/lib/Libcmds/add_verify_resources.c of 6.1.3) are
remarked where a row depends on them; tests/torque/ holds the rows against a real TORQUE where there is one.
"""
# ruff: noqa: E501 (a row of a table is a line)
# fmt: off

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Optional, Union

CL = "the command line"
GENERAL = "img: {default: micro}, vcpus: {max: 8}, ram: {max: 4G}"
JOB_ID = "12.host\n"
NO_RESULT = "vsub: the session is gone and left no exit status; was the job deleted?\n"
SCRIPT = b"#!/bin/sh\necho hello\n"
NONE: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """One command line.

    `argv` is None when qsub must not be called; `spec` is None for a job without guests, else the fields that differ
    from `DEFAULTS`. `words` are those of the command line; the script of most is `job.sh`, whose text is `script`.
    `files` are written beside it. `qsub` is what the stub answers: standard output, standard error, exit status;
    `result` what the job wrapper of a session leaves. `terminal` gives the row a terminal. `programs` holds the
    generated wrappers `job` and `prologue` where they are not the usual ones. `process` marks rows for which vsub must
    be a process of its own.
    """

    words: list[str]
    argv: Optional[list[str]]
    spec: Optional[dict[str, Any]] = None
    err: str = ""
    status: int = 0
    out: Optional[str] = JOB_ID
    script: bytes = SCRIPT
    stdin: Optional[bytes] = None
    env: Mapping[str, str] = NONE
    config: str = ""
    submit: str = ""
    files: Mapping[str, bytes] = NONE
    qsub: tuple[str, str, int] = (JOB_ID, "", 0)
    result: Optional[str] = None
    terminal: bool = False
    programs: Mapping[str, str] = NONE
    process: bool = False

    @property
    def name(self) -> str:
        text = shlex.join(self.words)
        more = [self.script.decode(errors="backslashreplace")] if self.script != SCRIPT else []
        more += [f"<{self.stdin!r}"] if self.stdin is not None else []
        more += [f"{key}={value}" for key, value in self.env.items()]
        more += [self.config.removeprefix("policy: ").replace(GENERAL, "")] if self.config else []
        return " ".join([text, *more]).replace("\n", " ")[:150]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def split(words: Union[str, list[str]]) -> list[str]:
    return shlex.split(words) if isinstance(words, str) else words


DEFAULTS: dict[str, Any] = {
    "image": "micro", "per_node": 1, "vcpus": 1, "ram_mib": 512,
    "asked": (), "distro": None, "arch": None, "pinning": ("auto", None), "fs_type": "overlay", "disk": None,
    "metadata": None, "mounts": ("home", "opt-hpc"), "network": "user", "suspend": False, "iocm": None, "vrdma": False,
    "unclot_mib": None, "workdir": "<work>", "shell": None, "interactive": False, "array": None, "arguments": "",
    "vm_prologue": None, "vm_epilogue": None, "keep": False,
}  # fmt: skip
"""The specification of a job for which nobody asked for anything, the one group's fields among the others."""

PROGRAMS = {"prologue": '#!/bin/sh\nexec PREFIX/libexec/vtorque-user-prologue "$@"\n', "job": '#!/bin/sh\nexec PREFIX/libexec/vtorque-job DIR "$@"\n'}


def guest_argv(options: Union[str, list[str]] = "", wanted: str = "mem=768mb", *, access: Optional[str] = "uniqueuser", name: Optional[str] = "job.sh", interactive: bool = False, job_type: Optional[str] = None) -> list[str]:
    """qsub's arguments for a guest job: what is always there, the user's `options`, what the guests need (`wanted`)."""
    words = ["-C", "", "-l", "prologue=DIR/prologue", "-S", "PREFIX/libexec/vtorque-job"]
    words += [] if job_type is None else ["-T", job_type]
    words += ["-I", "-x"] if interactive else []
    words += [] if name is None else ["-N", name]
    words += split(options)
    for resource in wanted.split():
        words += ["-l", resource]
    return [*words, *(["-l", f"naccesspolicy={access}"] if access else []), "DIR/job"]


def guest(line: Union[str, list[str]], options: Union[str, list[str]] = "", wanted: str = "mem=768mb", *, access: Optional[str] = "uniqueuser", name: Optional[str] = "job.sh", spec: Optional[dict[str, Any]] = None, job_type: Optional[str] = None, **more: Any) -> Row:
    """A guest job that is submitted."""
    interactive = (spec or {}).get("interactive", False)
    return Row(split(line), guest_argv(options, wanted, access=access, name=name, interactive=interactive, job_type=job_type), spec or {}, **more)


def refused(line: Union[str, list[str]], error: str, status: int = 2, **more: Any) -> Row:
    """A line that vsub refuses itself: one line on standard error, nothing else."""
    return Row(split(line), None, None, f"vsub: {error}\n", status, "", **more)


def plain(line: Union[str, list[str]], seen: Union[str, list[str]], **more: Any) -> Row:
    """A job without guests: qsub sees `seen`."""
    return Row(split(line), split(seen), None, process=True, **more)


def policy(extra: str) -> str:
    """A configuration with the general policy and more in it."""
    return f"policy: {{{GENERAL}, {extra}}}\n"


def unhonoured(line: str, option: str, reason: str, **more: Any) -> Row:
    place = more.pop("place", CL)
    return refused(line, f"VT-OPTION: {option} ({place}) cannot be honoured in a guest: {reason}; leave it out, or add -vm off", **more)


# ---------------------------------------------------------------- every letter of qsub's option string

LETTERS = [
    guest("job.sh"),
    guest("-a 2301 job.sh", "-a 2301"),
    guest("-A acct job.sh", "-A acct"),
    guest("-b 3 job.sh", "-b 3"),
    guest("-c n job.sh", "-c n"),
    guest("-c none job.sh", "-c none"),
    guest("-c ' n' job.sh", ["-c", " n"]),
    guest("-C '#XX' job.sh"),
    guest("-d sub job.sh", "-d sub", spec={"workdir": "<work>/sub"}),
    guest("-d <home>/other job.sh", "-d <home>/other", spec={"workdir": "<home>/other"}),
    guest("-w <home>/other job.sh", "-w <home>/other", spec={"workdir": "<home>/other"}),
    guest("-w <home>/other -d <home>/third job.sh", "-w <home>/other -d <home>/third", spec={"workdir": "<home>/third"}),
    guest("-e err job.sh", "-e err"),
    guest("-o out job.sh", "-o out"),
    guest("-o host:/tmp/o -e :/tmp/e job.sh", "-o host:/tmp/o -e :/tmp/e"),
    guest("-E job.sh", "-E"),
    guest("-f job.sh", "-f"),
    guest("-n job.sh", "-n"),
    guest("-F 'a  \"b c\"' job.sh", spec={"arguments": 'a  "b c"'}),
    guest(["-F", "", "job.sh"], spec={"arguments": ""}),
    guest("-F one -F two job.sh", spec={"arguments": "two"}),
    guest("-h job.sh", "-h"),
    guest("-t 1-4 -i 2 job.sh", "-t 1-4 -i 2", spec={"array": "1-4"}),
    guest("-j oe job.sh", "-j oe"),
    guest("-j eo -k oe job.sh", "-j eo -k oe"),
    guest("-j n -k n job.sh", "-j n -k n"),
    guest("-k o -k e job.sh", "-k o -k e"),
    guest("-K 9 job.sh", "-K 9"),
    guest("-l walltime=60 job.sh", "-l walltime=60"),
    guest("-m abe -M a@b.c,d job.sh", "-m abe -M a@b.c,d"),
    guest("-m n job.sh", "-m n"),
    guest("-N name job.sh", "-N name", name=None),
    guest("-p -5 job.sh", "-p -5"),
    guest("-q batch job.sh", "-q batch"),
    guest("-q batch@server job.sh", "-q batch@server"),
    guest("-q @server job.sh", "-q @server"),
    guest("-r n job.sh", "-r n"),
    guest("-S /bin/bash job.sh", spec={"shell": "/bin/bash"}),
    guest("-S /bin/csh@other,/bin/ksh job.sh", spec={"shell": "/bin/ksh"}),
    unhonoured("-S /bin/csh@other,/bin/ksh@more job.sh", "-S /bin/csh@other,/bin/ksh@more", "it names shells for single hosts only, and the job's is not known yet"),
    guest(["-S", "", "job.sh"]),
    guest("-u carol job.sh", "-u carol"),
    guest("-u carol@host,carol@other job.sh", "-u carol@host,carol@other"),
    guest("-v A=1,B job.sh", "-v A=1,B"),
    guest("-V job.sh", "-V"),
    guest("-W umask=022 job.sh", "-W umask=022"),
    guest("-z job.sh", out=""),
    unhonoured("-X job.sh", "-X", "X11 is not forwarded from guests"),
    unhonoured("-T other job.sh", "-T other", "vTorque's own hooks must run, and those of another name would run in their place"),
    unhonoured("-P dave job.sh", "-P dave", "a guest job is submitted by its own user"),
    unhonoured("-J 1 -P dave job.sh", "-J 1", "a guest job is submitted by its own user"),
    unhonoured("-D /root job.sh", "-D /root", "the root folder of a guest is its own"),
    unhonoured("-u dave job.sh", "-u dave", "a guest job runs as the user who submits it, carol"),
    unhonoured("-c enabled,interval=5 job.sh", "-c enabled,interval=5", "a guest is not checkpointed by the batch system"),
    refused("-S bash job.sh", f"VT-VALUE: -S bash ({CL}) names no absolute path"),
    refused(["-F", "a\nb", "job.sh"], f"VT-VALUE: -F ({CL}) is not one line of up to 4096 characters; put them into the script"),
    refused("-g job.sh", f"VT-USAGE: the option -g is not known ({CL}); see vsub --help and man qsub"),
    refused("-Vg job.sh", f"VT-USAGE: the option -g is not known ({CL}); see vsub --help and man qsub"),
    refused("--nonsense job.sh", f"VT-USAGE: the option --nonsense is not known ({CL}); see vsub --help and man qsub"),
    refused("job.sh -N", f"VT-USAGE: the option -N has no value ({CL}); see vsub --help and man qsub"),
    refused("job.sh other.sh", "VT-USAGE: one script can be submitted, not also 'other.sh'; quote its path; its arguments stand in -F, or behind it after --slurm"),
]

# ---------------------------------------------------------------- how options may be written

FORMS = [
    guest("-Nname job.sh", "-N name", name=None),
    guest("job.sh -N name", "-N name", name=None),
    guest("-q a job.sh -hV -N name", "-q a -h -V -N name", name=None),
    guest("-hVNname job.sh", "-h -V -N name", name=None),
    guest("-lwalltime=60 -lmem=1gb job.sh", "-l walltime=60 -l mem=1gb", "", spec={"ram_mib": 768}),
    guest("-joe job.sh", "-j oe"),
    guest("-N -h job.sh", ["-N", "-h"], name=None),
    guest("-N -- job.sh", ["-N", "--"], name=None),
    guest("-p-5 job.sh", "-p -5"),
    guest("-q a -q b job.sh", "-q a -q b"),
    guest(["-N", "", "job.sh"], ["-N", ""], name=None),
    guest(["-v", "A=a b\nc", "job.sh"], ["-v", "A=a b\nc"]),
    guest(["-v", "A=a,B='x,y',C=$z", "job.sh"], ["-v", "A=a,B='x,y',C=$z"]),
    guest(["-A", "'\"$x`\\", "job.sh"], ["-A", "'\"$x`\\"]),
    guest(["-A", "ünï \udcff", "job.sh"], ["-A", "ünï \udcff"]),
    guest("-v A=1 -v B=2 job.sh", "-v A=1 -v B=2"),  # to qsub the last -v counts
    guest("-W umask=022 -W x=a -W x=b job.sh", "-W umask=022 -W x=a -W x=b"),  # qsub adds the values of x up
    guest("-l walltime=60 -l cput=30 -l walltime=90 job.sh", "-l walltime=60 -l cput=30 -l walltime=90"),
    guest(["-l", "software='a,b',walltime=60", "job.sh"], ["-l", "software='a,b',walltime=60"]),
    guest("-l hostlist=a[1,2],walltime=60 job.sh", "-l hostlist=a[1,2],walltime=60"),
    guest("-l ' walltime = 60' job.sh", ["-l", " walltime = 60"]),
    # qsub looks for the script before it calls getopt: what stands behind a `--`, or behind a letter with a value that
    # is not the first of its word, it takes otherwise than getopt (find_job_script_index)
    guest("-- job.sh"),  # qsub 6.1 overlooks a script behind -- and reads standard input
    guest("-hN x job.sh", "-h -N x", name=None, files={"x": b"echo x\n"}),  # qsub 6.1 takes x for the script
    guest("job.sh --"),
    guest("job.sh -hN x", "-h -N x", name=None),
    guest("-v m job.sh", "-v m"),
    guest("-vm=1 job.sh", "-v m=1"),
    guest("-vmx job.sh", "-v mx"),
    guest("-v -vm job.sh", "-v -vm"),
    guest("-Vvm job.sh", "-V -v m"),
    guest("-v m -vm vcpus=1 job.sh", "-v m", spec={"asked": ("vcpus",)}),
    guest("-vm vcpus=1 -v m job.sh -vm ram=512M", "-v m", spec={"asked": ("ram", "vcpus")}),
    guest("-vm vcpus=1 -vm vcpus=1 job.sh", spec={"asked": ("vcpus",)}),
    guest("-vm vcpus=1,ram=0.5G,vcpus=1 job.sh", spec={"asked": ("ram", "vcpus")}),
    guest("sub/../job.sh"),
    guest("./job.sh"),
    guest("<work>/job.sh"),
    guest("'sub/a b.sh' -N x", "-N x", name=None, files={"sub/a b.sh": SCRIPT}),
    guest(["sub/ü.sh"], name="ü.sh", files={"sub/ü.sh": SCRIPT}),
    refused("job.sh -vm", f"VT-USAGE: -vm ({CL}) has no value; write -vm key=value[,key=value], or -vm off"),
    refused("-vm off -vm vcpus=3 job.sh", f"VT-KEY: -vm off ({CL}) and -vm vcpus=3 ({CL}, -vm no. 2) exclude each other"),
    refused("-vm vcpus=2 -vm vcpus=3 job.sh", f"VT-KEY: vcpus is asked for twice: 2 ({CL}) and 3 ({CL}, -vm no. 2); give it once"),
    refused("-vm vcpus=2,vcpus=3 job.sh", f"VT-KEY: vcpus is asked for twice: 2 ({CL}) and 3 ({CL}); give it once"),
    refused("-l walltime job.sh", f"VT-USAGE: illegal -l value 'walltime' ({CL}): 'walltime' has no value; write -l name=value[,name=value…]"),
    refused("-l walltime=60, job.sh", f"VT-USAGE: illegal -l value 'walltime=60,' ({CL}): it ends with a comma; write -l name=value[,name=value…]"),
    refused("-l =60 job.sh", f"VT-USAGE: illegal -l value '=60' ({CL}): an item has no name; write -l name=value[,name=value…]"),
]

# ---------------------------------------------------------------- the prefix of directives

Q = b"#!/bin/sh\n#Q -q q1\n#PBS -q q2\ntrue\n"
PREFIXES = [
    guest("job.sh", "-q q2", script=Q),
    guest("-C '#Q' job.sh", "-q q1", script=Q),
    guest("-C '#PBS' job.sh", "-q q2", script=Q, env={"PBS_DPREFIX": "#Q"}),
    guest("job.sh", "-q q1", script=Q, env={"PBS_DPREFIX": "#Q"}),
    guest(["-C", "", "job.sh"], script=Q),
    guest("job.sh", script=Q, env={"PBS_DPREFIX": ""}),
    guest("job.sh -C '#Q'", "-q q2", script=Q),  # qsub looks for it before the script only
    guest("-C '#Q' -C '#PBS' job.sh", "-q q2", script=Q),
    guest("-C '#P' job.sh", "-N fromscript", name=None, script=b"#PBS\n#P-N fromscript\ntrue\n"),
    guest("-C '#Q' job.sh", "-q q1", script=b"#PBS -vm vcpus=2\n#Q -q q1\ntrue\n"),
    refused("-C#Q job.sh", f"VT-USAGE: qsub takes the word after -C#Q for the prefix: write -C #Q apart ({CL}); see vsub --help and man qsub", script=Q),
]

# ---------------------------------------------------------------- directives in the script


def script(line: Union[str, list[str]], text: Union[str, bytes], options: Union[str, list[str]] = "", **more: Any) -> Row:
    """A guest job with directives."""
    return guest(line, options, script=text.encode() if isinstance(text, str) else text, **more)


DIRECTIVES = [
    script("job.sh", "#PBS -q a\ntrue\n", "-q a"),
    script("job.sh", "#!/bin/sh\n\n  \t#PBS -q a\n# a comment\n:\n#PBS -A b\ntrue\n", "-q a -A b"),
    script("job.sh", "#!/bin/sh\ntrue\n#PBS -q a -vm nonsense\n"),
    script("job.sh", " : command\n#PBS -q a\n"),  # a colon is no command only at the very start of a line
    script("job.sh", "#PBS-qa\n#PBS -q b", "-q a -q b"),
    script("job.sh", "#PBS -q a -hV\n#PBS words that are no options -A b\n", "-q a -h -V -A b"),
    script("job.sh", "#PBS -N fromscript -l walltime=60\n", "-N fromscript -l walltime=60", name=None),
    script("job.sh", "#PBS -v 'A=1 2',B\\ C -A \"x'y\"\n", ["-v", "A=1 2,B C", "-A", "x'y"]),
    script("job.sh", "#PBS -A 'a'\"b\"c\\'\n", ["-A", "abc'"]),
    script("job.sh", "#PBS -A ''\n", ["-A", ""]),
    script("job.sh", "#PBS -l \\\nwalltime=60,\\\ncput=30\n#PBS -q a\n", "-l walltime=60,cput=30 -q a"),
    script("job.sh", "#PBS -A a\\b\n", "-A ab"),
    script("job.sh", "#PBS -q a # not a comment\n", "-q a"),
    script("job.sh", "##PBS -q a\n# PBS -q b\n#pbs -q c\n"),
    script("job.sh", b"#PBS -A \xff\xfe\n", ["-A", "\udcff\udcfe"]),
    script("job.sh", b"echo no shebang, no newline"),
    script("job.sh", b""),
    script("job.sh", b"\n\n"),
    script("job.sh", b"#!/bin/sh\r\n#PBS -q a\r\n#PBS -l \\\r\nwalltime=60\r\necho\r\n", "-q a -l walltime=60", err="vsub: note: the job script 'job.sh' has DOS line ends; the job gets it with Unix line ends\n"),
    script("job.sh", b"#PBS -A " + b"x" * 200 + b"\n", ["-A", "x" * 200]),
    script("job.sh", "#PBS -vm vcpus=2,ram=1.5G\n", wanted="nodes=1:ppn=2 mem=1792mb", spec={"asked": ("ram", "vcpus"), "vcpus": 2, "ram_mib": 1536}),
    script("job.sh", "#PBS -q a -vm vcpus=2 -A b\n", "-q a -A b", wanted="nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), "vcpus": 2}),
    script("job.sh", "#PBS -vm vcpus=2\n#PBS -vm ram=1G\n", wanted="nodes=1:ppn=2 mem=1280mb", spec={"asked": ("ram", "vcpus"), "vcpus": 2, "ram_mib": 1024}),
    script("job.sh", "#PBS -v m\n", "-v m"),
    script("job.sh", "#PBS --\n#PBS -q a\n", "-q a"),
    script("job.sh", "#PBS -h -- -q a\n", "-h"),
    unhonoured("job.sh", "-T other", "vTorque's own hooks must run, and those of another name would run in their place", script=b"#!/bin/sh\n\n#PBS -T other\n", place="job.sh line 3"),
    refused("job.sh", "VT-POLICY: vcpus=99 (job.sh line 2) is above the maximum 8; 1 to 8 is allowed (<config> line 3)", script=b"#!/bin/sh\n#PBS -vm vcpus=99\n"),
    refused("job.sh", "VT-KEY: vcpus is asked for twice: 2 (job.sh line 1) and 3 (job.sh line 2); give it once", script=b"#PBS -vm vcpus=2\n#PBS -vm vcpus=3\n"),
    refused("job.sh", "VT-KEY: vcpus is asked for twice: 2 (job.sh line 1) and 3 (job.sh line 1, -vm no. 2); give it once", script=b"#PBS -vm vcpus=2 -vm vcpus=3\n"),
    refused("job.sh", "VT-USAGE: unmatched ' in job.sh line 2; close the quotation", script=b"#!/bin/sh\n#PBS -N 'open\n"),
    refused("job.sh", "VT-USAGE: the option -y is not known (job.sh line 2); see vsub --help and man qsub", script=b"#!/bin/sh\n#PBS -y\n"),
    refused("job.sh", "VT-USAGE: the option --wait is not known (job.sh line 1); see vsub --help and man qsub", script=b"#PBS --wait\n"),
    refused("job.sh", "VT-USAGE: -vm (job.sh line 1) has no value; write -vm key=value[,key=value], or -vm off", script=b"#PBS -vm\n"),
    refused("job.sh", "VT-USAGE: job.sh line 1: a directive goes on (\\) where the file ends; take the backslash out", script=b"#PBS -q a\\\n"),
    refused("job.sh", "VT-SCRIPT: the job script 'job.sh' is a program, not a script; start it from a shell script", script=b"\x7fELF\0\0"),
    refused("job.sh", "VT-SCRIPT: the job script 'job.sh' is binary, not a script; start it from a shell script", script=b"echo\0"),
    refused("missing", "VT-SCRIPT: cannot read the job script 'missing': No such file or directory"),
    refused(".", "VT-SCRIPT: the job script '.' is not a file"),
]

# ---------------------------------------------------------------- the script on standard input

STDIN = [
    guest("", name="STDIN", stdin=b"echo hello\n"),
    guest("-", name="STDIN", stdin=b"echo hello\n"),
    guest("-q a -", "-q a", name="STDIN", stdin=b"echo hello"),
    guest([""], name="STDIN", stdin=b"echo hello\n"),  # to qsub no script either
    guest("-q b", "-q a -q b", name="STDIN", stdin=b"#PBS -q a\necho $1 \xff\n"),
    guest("", "-q a", name="STDIN", stdin=b"#PBS -q a\r\necho\r\n"),  # qsub turns these itself: nothing to be told
    guest("-N name", "-N name", name=None, stdin=b""),
    guest("", "-N fromscript", name=None, stdin=b"#PBS -N fromscript\n"),
    guest("", name="STDIN", stdin=b"#PBS -vm ram=1G\n", wanted="mem=1280mb", spec={"asked": ("ram",), "ram_mib": 1024}),
    refused("", "VT-SCRIPT: the job script is binary, not a script; start it from a shell script", stdin=b"\0"),
    refused("", "VT-KEY: unknown request in standard input line 1: 'x'; allowed: <keys>", stdin=b"#PBS -vm x\n"),
]

# ---------------------------------------------------------------- interactive jobs

SESSION = {"interactive": True, "keep": True}
INTERACTIVE = [
    guest("-I -x job.sh", spec=SESSION, err=NO_RESULT, status=1),
    guest("-I -x job.sh", spec=SESSION, result='{"v": 1, "status": 7, "code": null}', status=7),
    guest("-I -x job.sh -q a", "-q a", spec=SESSION, result='{"v": 1, "status": 0, "code": null}'),
    guest("-x -I job.sh", spec=SESSION, result='{"v": 1, "status": 0, "code": null}'),
    guest("-I -x job.sh", "-q a", script=b"#PBS -q a\ntrue\n", spec=SESSION, result='{"v": 1, "status": 255, "code": null}', status=255),
    guest("-I -x -F 'a b' job.sh", ["-F", "a b"], spec=SESSION, result='{"v": 1, "status": 0, "code": null}'),
    guest("-W interactive=true -x job.sh", spec=SESSION, result='{"v": 1, "status": 0, "code": null}'),
    guest("-x job.sh", spec=SESSION, script=b"#PBS -I\ntrue\n", result='{"v": 1, "status": 0, "code": null}'),
    guest("-I -x -vm vcpus=2,ram=1G job.sh", wanted="nodes=1:ppn=2 mem=1280mb", spec={**SESSION, "asked": ("ram", "vcpus"), "vcpus": 2, "ram_mib": 1024}, result='{"v": 1, "status": 0, "code": null}'),
    guest("-I", name="STDIN", spec={**SESSION, "script": None}, terminal=True, result='{"v": 1, "status": 3, "code": null}', status=3),
    guest("-I job.sh", "-q a", script=b"#PBS -q a\ntrue\n", spec={**SESSION, "script": None}, terminal=True, result='{"v": 1, "status": 0, "code": null}'),
    guest("-I -N name -l walltime=60", "-N name -l walltime=60", name=None, spec={**SESSION, "script": None}, terminal=True, result='{"v": 1, "status": 0, "code": null}'),
    guest("-I -x job.sh", spec=SESSION, qsub=("", "qsub: no\n", 188), err="qsub: no\n", status=188, out=""),
    refused("-I", "VT-USAGE: standard input and output must be a terminal for an interactive job; submit a script without -I, or name a command with -x"),
    refused("-I -t 1-2 job.sh", "VT-USAGE: an interactive job cannot be a job array (-t 1-2); leave one out"),
    refused("-x job.sh", f"VT-USAGE: -x ({CL}) goes with -I only; add -I, or leave it out"),
    refused("-I -x", f"VT-USAGE: -x ({CL}) names no script; write vsub -I -x SCRIPT"),
    refused("--wait -I -x job.sh", f"VT-OPTION: --wait cannot be combined with -I ({CL}): an interactive job is its own wait"),
]

# ---------------------------------------------------------------- arrays, holds, dependencies, staging

ATTRIBUTES = [
    guest("-t 1-4%2 job.sh", "-t 1-4%2", spec={"array": "1-4"}),
    guest("-t 0,3,7-9 job.sh", "-t 0,3,7-9", spec={"array": "0,3,7-9"}),
    guest("-t 5 job.sh", "-t 5", spec={"array": "5"}),
    guest("-W job_array_request=1-3 job.sh", "-W job_array_request=1-3", spec={"array": "1-3"}),
    script("job.sh", "#PBS -t 1-3\n", "-t 1-3", spec={"array": "1-3"}),
    guest("-W depend=afterok:1.host job.sh", "-W depend=afterok:1.host"),
    guest("-h -W depend=afterany:1.host:2.host,before:3.host job.sh", "-h -W depend=afterany:1.host:2.host,before:3.host"),
    guest("-W stagein=in@host:/data/in job.sh", "-W stagein=in@host:/data/in"),
    guest("-W stageout=<home>/out@host:/data/out job.sh", "-W stageout=<home>/out@host:/data/out"),
    guest("-W group_list=users job.sh", "-W group_list=users"),
    guest("-W group_list=users@a,users@b job.sh", "-W group_list=users@a,users@b"),
    guest("-t 1-3 -W job_array_request=5-6 job.sh", "-t 1-3 -W job_array_request=5-6", spec={"array": "5-6"}),
    guest("-W job_array_request=5-6 -t 1-3 job.sh", "-W job_array_request=5-6 -t 1-3", spec={"array": "1-3"}),
    guest("-W group_list=users@host job.sh", "-W group_list=users@host"),
    guest("-W x=ADVRES:a.1 job.sh", "-W x=ADVRES:a.1"),
    guest("-W ADVRES:a.1 job.sh", "-W ADVRES:a.1"),  # without a name it is one of x
    guest("-W 'umask = 022' job.sh", ["-W", "umask = 022"]),
    refused("-t x job.sh", f"VT-USAGE: 'x' ({CL}) is no request of a job array; write -t 1-4, -t 0,3,7-9 or -t 1-100%10"),
    refused("-t 3-1 job.sh", f"VT-USAGE: '3-1' ({CL}) is no request of a job array; write -t 1-4, -t 0,3,7-9 or -t 1-100%10"),
    refused("--wait -t 1-2 job.sh", f"VT-OPTION: --wait cannot be combined with -t 1-2 ({CL}): each member of a job array has an end of its own"),
    unhonoured("-W stagein=/tmp/x@host:/data/in job.sh", "-W stagein=/tmp/x@host:/data/in", "/tmp/x on the node is not visible in the guest"),
    unhonoured("-W stageout=../x@host:/data/out job.sh", "-W stageout=../x@host:/data/out", "../x on the node is not visible in the guest"),
    unhonoured("-W group_list=chem job.sh", "-W group_list=chem", "a guest job runs with the primary group of its user, users"),
    unhonoured("-W group_list=users,chem job.sh", "-W group_list=users,chem", "a guest job runs with the primary group of its user, users"),
    unhonoured("-W jobtype=other job.sh", "-W jobtype=other", "vTorque's own hooks must run, and those of another name would run in their place"),
    unhonoured("-W proxy_user=dave job.sh", "-W proxy_user=dave", "a guest job is submitted by its own user"),
    unhonoured("-W Job_Name=x job.sh", "-W Job_Name=x", "write it as -N"),
    unhonoured("-W init_work_dir=/tmp job.sh", "-W init_work_dir=/tmp", "write it as -w"),
    refused("-d /usr job.sh", f"VT-WORKDIR: the job's directory '/usr' ({CL}) is not visible in the guest; visible: <home>; submit from there, or give -d"),
    refused("-w <home>/.. job.sh", f"VT-WORKDIR: the job's directory '<home>/..' ({CL}) is not visible in the guest; visible: <home>; submit from there, or give -d"),
]

# ---------------------------------------------------------------- the user's own prologue and epilogue


def then(path: str) -> dict[str, str]:
    """The prologue wrapper that runs the user's own prologue at the end."""
    return {"prologue": f'#!/bin/sh\nexec PREFIX/libexec/vtorque-user-prologue --then {path} -- "$@"\n'}


HOOKS = [
    guest("-l prologue=/opt/before job.sh", programs=then("/opt/before")),
    guest("-l prologue=before,walltime=60 job.sh", "-l walltime=60", programs=then("<work>/before")),
    guest("-w <home>/other -l prologue=before job.sh", "-w <home>/other", spec={"workdir": "<home>/other"}, programs=then("<home>/other/before")),
    guest("-d <home>/other -l prologue=before job.sh", "-d <home>/other", spec={"workdir": "<home>/other"}, programs=then("<work>/before")),
    guest("-l \"prologue='<home>/a b'\" job.sh", programs=then("'<home>/a b'")),
    guest("-l epilogue=after job.sh", "-l epilogue=after"),
    guest("-l epilogue=/opt/after,prologue=/opt/before job.sh", "-l epilogue=/opt/after", programs=then("/opt/before")),
    script("-l prologue=/two job.sh", "#PBS -l prologue=/one\n#PBS -l epilogue=/three\n", "-l epilogue=/three", programs=then("/two")),
]

# ---------------------------------------------------------------- precedence

DAVE = "users: {carol: {vcpus: {default: 3}}}"
PRECEDENCE = [
    script("-q b -l walltime=30 job.sh", "#PBS -q a -l walltime=60\n", "-q a -l walltime=60 -q b -l walltime=30"),
    script("-vm vcpus=2 job.sh", "#PBS -vm vcpus=4,ram=1G\n", wanted="nodes=1:ppn=2 mem=1280mb", spec={"asked": ("ram", "vcpus"), "vcpus": 2, "ram_mib": 1024}),
    script("-S /bin/bash job.sh", "#PBS -S /bin/csh\n", spec={"shell": "/bin/bash"}),
    script("-l nodes=1:ppn=2 job.sh", "#PBS -l nodes=4\n", "-l nodes=4 -l nodes=1:ppn=2", spec={"vcpus": 2}),
    script("-vm vcpus=2 job.sh", "#PBS -vm off\n", wanted="nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), "vcpus": 2}),
    plain("-vm off job.sh", "job.sh", script=b"#PBS -vm vcpus=2\n"),
    guest("job.sh", config=policy(DAVE), wanted="nodes=1:ppn=3 mem=768mb", spec={"vcpus": 3}),
    guest("-vm vcpus=2 job.sh", config=policy(DAVE), wanted="nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), "vcpus": 2}),
    guest("job.sh", config=policy(f"{DAVE}, groups: {{users: {{vcpus: {{default: 2}}}}}}"), wanted="nodes=1:ppn=3 mem=768mb", spec={"vcpus": 3}),
    guest("-q long job.sh", "-q long", config=policy("groups: {users: {vcpus: {default: 2}}}, queues: {long: {vcpus: {default: 4}, ram: {default: 1G}}}"), wanted="nodes=1:ppn=2 mem=1280mb", spec={"vcpus": 2, "ram_mib": 1024}),
    guest("-q short -q long@server job.sh", "-q short -q long@server", config=policy("queues: {long: {ram: {default: 1G}}}"), wanted="mem=1280mb", spec={"ram_mib": 1024}),
    script("job.sh", "#PBS -q long\n", "-q long", config=policy("queues: {long: {ram: {default: 1G}}}"), wanted="mem=1280mb", spec={"ram_mib": 1024}),
    guest("job.sh", config=policy("queues: {long: {ram: {default: 1G}}}"), submit=", default_queue: long", wanted="mem=1280mb", spec={"ram_mib": 1024}),
    guest("-q @server job.sh", "-q @server", config=policy("queues: {long: {ram: {default: 1G}}}"), submit=", default_queue: long", wanted="mem=1280mb", spec={"ram_mib": 1024}),
    guest("-q other job.sh", "-q other", config=policy("queues: {long: {ram: {default: 1G}}}"), submit=", default_queue: long"),
    guest("job.sh", config=policy("groups: {chem: {vcpus: {default: 2}}}, users: {dave: {vcpus: {default: 2}}}")),
    guest("job.sh", config=policy("users: {carol: {img: {default: debian-12}}}"), spec={"image": "debian-12"}),
    refused("-vm vcpus=5 job.sh", f"VT-POLICY: vcpus=5 ({CL}) is above the maximum 4; 1 to 4 is allowed (<config> line 3, policy.users.carol.vcpus.max)", config=policy("groups: {users: {vcpus: {max: 6}}}, users: {carol: {vcpus: {max: 4}}}")),
    refused("-q long -vm ram=1G job.sh", f"VT-POLICY: ram=1G ({CL}) is below the minimum 2G; 2G to 4G is allowed (<config> line 3, policy.queues.long.ram.min)", config=policy("queues: {long: {ram: {min: 2G}}}")),
]

# ---------------------------------------------------------------- the keys of -vm


def key(request: str, field: dict[str, Any], wanted: str = "mem=768mb", **more: Any) -> Row:
    """A guest job that asks for one thing or several."""
    asked = tuple(sorted({item.partition("=")[0] for item in request.split(",")}))
    return guest(f"-vm '{request}' job.sh", "", wanted, spec={"asked": asked, **field}, **more)


def wrong(request: str, error: str, **more: Any) -> Row:
    return refused(f"-vm '{request}' job.sh", error, **more)


def misread(request: str, needed: str) -> Row:
    return wrong(request, f"VT-VALUE: {request} in {CL} cannot be read; {needed}")


COUNT, SIZE = "a whole number is needed", "a size such as 2048M or 1.5G (a whole number of MiB) is needed"
SWITCH = "true, yes, on, enabled or false, no, off, disabled is needed"
AMBIGUOUS = f"{SWITCH}; 0 and 1 are ambiguous: to the vTorque of 2018, 0 was enabled and 1 disabled"
TOGETHER = {"network": "job"}
"""What several guests get when nobody says otherwise."""
HAS_ALL = "components: {iocm: true, vrdma: true, unclot: true}\n"
SITE_HAS_ALL = f"policy: {{{GENERAL}}}\n{HAS_ALL}"
WIDE = policy("vms_per_node: {max: 4}, fs_type: {allowed: [overlay, sharedfs, ramdisk]}, network: {allowed: [user, bridge, job]}, disk: {enabled: true, max: 20G}, metadata: {allowed: [packages, write_files]}, nodes: {max: 4}")
FOLDER = "suspended: {folder: /scratch/suspended}\n"
SUSPENDED = f"policy: {{{GENERAL}}}\n{FOLDER}"
SUSPENDED_BY_DEFAULT = policy("suspend: {default: true}") + FOLDER
MAP = b"1: {0: 2, 1: '4-5,7'}\n"
CLOUD = b"packages: [gcc]\n"

KEYS = [
    key("img=debian-12", {"image": "debian-12"}),
    key("distro=slg", {"distro": "slg"}),
    key("img=debian-12,distro=debian", {"image": "debian-12", "distro": "debian"}),
    key("arch=amd64", {"arch": "amd64"}),
    key("vcpus=8", {"vcpus": 8}, "nodes=1:ppn=8 mem=768mb"),
    key("ram=2048M", {"ram_mib": 2048}, "mem=2304mb"),
    key("ram=2048", {"ram_mib": 2048}, "mem=2304mb"),
    key("ram=2g", {"ram_mib": 2048}, "mem=2304mb"),
    key("ram=2097152K", {"ram_mib": 2048}, "mem=2304mb"),
    key("ram=0.25g", {"ram_mib": 256}, "mem=512mb"),
    key("ram=1.5GiB", {"ram_mib": 1536}, "mem=1792mb"),
    key("ram=128M", {"ram_mib": 128}, "mem=384mb"),
    key("vms_per_node=1", {}),
    key("vms_per_node=2", {"per_node": 2, **TOGETHER}, "nodes=1:ppn=2 mem=1280mb", config=WIDE),
    key("vms_per_node=3,vcpus=2,ram=1G", {**TOGETHER, "per_node": 3, "vcpus": 2, "ram_mib": 1024}, "nodes=1:ppn=6 mem=3328mb", config=WIDE),
    key("vcpu_pinning=auto", {}),
    key("vcpu_pinning=off", {"pinning": ("off", None)}),
    key("vcpu_pinning=numad", {"pinning": ("numad", None)}),
    key("vcpus=2,vcpu_pinning=map.yaml", {"vcpus": 2, "pinning": ("map", (("2", "4-5,7"),))}, "nodes=1:ppn=2 mem=768mb", files={"map.yaml": MAP}),
    key("fs_type=overlay", {}),
    key("fs_type=ramdisk", {"fs_type": "ramdisk"}, config=WIDE),
    key("disk=20G", {"disk": (None, 20480)}, config=WIDE),
    key("disk=data.img", {"disk": ("<work>/data.img", None)}, config=WIDE),
    key("disk=/x/../10G", {"disk": ("/x/../10G", None)}, config=WIDE),
    key("disk=./10G", {"disk": ("<work>/./10G", None)}, config=WIDE),
    key("vm_prologue=before", {"vm_prologue": sha256(b"echo before\n")}, files={"before": b"echo before\r\n"}),
    key("vm_epilogue=sub/after", {"vm_epilogue": sha256(b"echo after\n")}, files={"sub/after": b"echo after\n"}),
    key("img=debian-12,metadata=cloud.yaml", {"image": "debian-12", "metadata": {"packages": ["gcc"]}}, config=WIDE, files={"cloud.yaml": CLOUD}),
    key("network=job", {"network": "job"}, config=WIDE),
    key("mounts=home", {"mounts": ("home",)}),
    key("mounts=opt-hpc+home", {"mounts": ("opt-hpc", "home")}),
    key("iocm=true", {"iocm": (1, 1)}, "nodes=1:ppn=2 mem=768mb", config=SITE_HAS_ALL),
    key("iocm=yes,iocm_min_cores=0,iocm_max_cores=2", {"iocm": (0, 2)}, config=SITE_HAS_ALL),
    key("vcpus=2,iocm=ON,iocm_min_cores=2,iocm_max_cores=4", {"vcpus": 2, "iocm": (2, 4)}, "nodes=1:ppn=4 mem=768mb", config=SITE_HAS_ALL),
    key("iocm=false", {}, config=SITE_HAS_ALL),
    key("vrdma=enabled", {"vrdma": True}, config=SITE_HAS_ALL),
    key("unclot=true", {"unclot_mib": 64}, "mem=832mb", config=SITE_HAS_ALL),
    key("unclot=true,unclot_shmem=1G", {"unclot_mib": 1024}, "mem=1792mb", config=SITE_HAS_ALL),
    key("suspend=on", {"suspend": True}, config=SUSPENDED),
    key("suspend=on,network=job", {"suspend": True, "network": "job"}, config=SUSPENDED),
    key("suspend=off", {}),
    guest("-I -x job.sh", spec=SESSION, result='{"v": 1, "status": 0, "code": null}', config=SUSPENDED_BY_DEFAULT),
    guest("-r n job.sh", "-r n", "mem=768mb", config=SUSPENDED_BY_DEFAULT),
    guest("-r y job.sh", "-r y", "mem=768mb", spec={"suspend": True}, config=SUSPENDED_BY_DEFAULT),
    key("suspend=off", {}, config=SUSPENDED_BY_DEFAULT),
    guest("job.sh", "", "mem=768mb", config=policy("suspend: {default: true}")),
    key("iocm=off,vrdma=disabled,unclot=no", {}),  # what is not asked for need not be there
    misread("vcpus=two", COUNT),
    misread("vcpus=1.5", COUNT),
    misread("vms_per_node=-1", COUNT),
    misread("ram=1.3M", SIZE),
    misread("ram=lots", SIZE),
    misread("unclot_shmem=1K", SIZE),
    misread("disk=10X", "a size such as 10G, or the path of a disk is needed"),
    misread("mounts=home+", "names of shares joined by +, or none is needed"),
    misread("iocm=0", AMBIGUOUS),
    misread("vrdma=1", AMBIGUOUS),
    misread("unclot=maybe", SWITCH),
    wrong("img=", f"VT-VALUE: img in {CL} has no value; write img=VALUE"),
    wrong("cpus=2", f"VT-KEY: unknown request in {CL}: the key 'cpus'; allowed: <keys>"),
    wrong("vcpus", f"VT-VALUE: vcpus in {CL} has no value; write vcpus=VALUE"),
    wrong("vcpus=2,", f"VT-KEY: unknown request in {CL}: a comma with nothing beside it; allowed: <keys>"),
    wrong("off,vcpus=2", f"VT-KEY: unknown request in {CL}: 'off'; allowed: <keys>"),
    refused(["-vm", "", "job.sh"], f"VT-KEY: unknown request in {CL}: ''; allowed: <keys>"),
    wrong("vcpus=9", f"VT-POLICY: vcpus=9 ({CL}) is above the maximum 8; 1 to 8 is allowed (<config> line 3)"),
    wrong("vcpus=0", f"VT-POLICY: vcpus=0 ({CL}) is below the minimum 1; 1 to 8 is allowed (the built-in default)"),
    wrong("ram=64M", f"VT-POLICY: ram=64M ({CL}) is below the minimum 128M; 128M to 4G is allowed (the built-in default)"),
    wrong("ram=5G", f"VT-POLICY: ram=5G ({CL}) is above the maximum 4G; 128M to 4G is allowed (<config> line 3)"),
    wrong("vms_per_node=17", f"VT-POLICY: vms_per_node=17 ({CL}) is above the maximum 16; 1 to 16 is allowed (the built-in default)"),
    wrong("img=suse", f"VT-IMAGE: img=suse ({CL}): unknown image 'suse' in the pool <pool>; images: debian-12, micro"),
    wrong("img=a/x", f"VT-IMAGE: img=a/x ({CL}): unknown image 'a/x' in the pool <pool>; images: debian-12, micro"),
    wrong("img=debian-12", f"VT-POLICY: img=debian-12 ({CL}) is not allowed; allowed: micro (<config> line 3)", config="policy: {img: {default: micro, allowed: [micro]}}\n"),
    wrong("distro=redhat", f"VT-IMAGE: distro=redhat ({CL}) does not describe the image micro; it is micro (SLG); distro= asserts, img= selects"),
    wrong("arch=arm64", f"VT-IMAGE: arch=arm64 ({CL}) does not describe the image micro; it is x86_64; arch= asserts, img= selects"),
    wrong("img=debian-12,ram=256M", f"VT-POLICY: ram=256M ({CL}) is less than the image debian-12 needs; at least 384M (the image's description in <pool>)"),
    wrong("fs_type=ramdisk", f"VT-POLICY: fs_type=ramdisk ({CL}) is not allowed; allowed: overlay (the built-in default)"),
    wrong("network=bridge", f"VT-POLICY: network=bridge ({CL}) is not allowed; allowed: user, job (the built-in default)"),
    wrong("disk=1G", f"VT-POLICY: disk=1G ({CL}) is refused; disk is switched off here (policy.disk.enabled, the built-in default)"),
    wrong("disk=21G", f"VT-POLICY: disk=21G ({CL}) is too large; at most 20G (<config> line 3)", config=WIDE),
    wrong("mounts=scratch", f"VT-POLICY: mounts=scratch ({CL}) names scratch, which the site has not; shares: home, opt-hpc"),
    wrong("mounts=home+opt-hpc", f"VT-POLICY: mounts=opt-hpc ({CL}) is not allowed; allowed: home (<config> line 3)", config=policy("mounts: {allowed: [home]}")),
    wrong("mounts=none", "VT-WORKDIR: the job's directory '<work>' (where you are) is not visible in the guest; visible: nothing; submit from there, or give -d"),
    wrong("metadata=cloud.yaml", f"VT-POLICY: metadata=packages ({CL}) is not allowed; allowed: nothing (the built-in default)", files={"cloud.yaml": CLOUD}),
    wrong("metadata=cloud.yaml", f"VT-IMAGE: metadata ({CL}) needs cloud-init, which the image micro has not; choose another image", files={"cloud.yaml": CLOUD}, config=WIDE),
    wrong("metadata=cloud.yaml", f"VT-VALUE: cloud.yaml ({CL}) cannot be used: it is no cloud-config; needed: a mapping of plain values, nested up to 16 deep", files={"cloud.yaml": b"- a\n"}, config=WIDE),
    wrong("metadata=cloud.yaml", f"VT-VALUE: metadata ({CL}): cloud.yaml line 1: not YAML: expected the node content, but found '<stream end>'", files={"cloud.yaml": b"packages: ["}, config=WIDE),
    wrong("vm_prologue=absent", "VT-SCRIPT: cannot read the vm_prologue 'absent': No such file or directory"),
    wrong("vm_epilogue=prog", "VT-SCRIPT: the vm_epilogue 'prog' is a program, not a script; start it from a shell script", files={"prog": b"\x7fELF\0"}),
    key("vcpu_pinning=map.yaml", {"pinning": ("map", (("010",),))}, files={"map.yaml": b"1: {0: 010}\n"}),
    wrong("vcpu_pinning=map.yaml", "VT-SCRIPT: the vcpu_pinning 'map.yaml' is binary, not a YAML file", files={"map.yaml": b"1: \0"}),
    wrong("vcpus=2,vcpu_pinning=map.yaml", f"VT-VALUE: map.yaml ({CL}) cannot be used: the vCPUs of guest 1 are not numbered from 0; needed: 1 guests with 2 vCPUs each, such as `1: {{0: 2, 1: 4-5}}`", files={"map.yaml": b"1: {0: 2}\n"}),
    wrong("vcpu_pinning=map.yaml", f"VT-VALUE: map.yaml ({CL}) cannot be used: 'all' of guest 1 is no list of CPUs; needed: 1 guests with 1 vCPUs each, such as `1: {{0: 2, 1: 4-5}}`", files={"map.yaml": b"1: {0: all}\n"}),
    wrong("iocm=true", f"VT-POLICY: iocm=true ({CL}) is not available on this site; components.iocm, the built-in default"),
    wrong("vrdma=true", f"VT-POLICY: vrdma=true ({CL}) is not available on this site; components.vrdma, the built-in default"),
    wrong("unclot=true", f"VT-POLICY: unclot=true ({CL}) is not available on this site; components.unclot, the built-in default"),
    wrong("suspend=on", f"VT-POLICY: suspend=true ({CL}) is not available on this site; suspended.folder is not set, the built-in default"),
    wrong("suspend=on", f"VT-POLICY: suspend=true ({CL}) is refused; suspend is switched off here (policy.suspend.enabled, <config> line 3)", config=policy("suspend: {enabled: false}") + FOLDER),
    refused("-I -vm suspend=on", f"VT-POLICY: suspend=true ({CL}) does not go with an interactive job (-I); leave one of the two out", config=SUSPENDED),
    refused("-r n -vm suspend=on job.sh", f"VT-POLICY: suspend=true ({CL}) does not go with -r n, because a suspended job is requeued; leave one of the two out", config=SUSPENDED),
    wrong("suspend=on,network=bridge", f"VT-POLICY: suspend=true ({CL}) does not go with network=bridge; leave one of the two out", config=WIDE + FOLDER),
    wrong("suspend=on,vrdma=on", f"VT-POLICY: suspend=true ({CL}) does not go with vrdma=true; leave one of the two out", config=SITE_HAS_ALL + FOLDER),
    wrong("suspend=on,iocm=on", f"VT-POLICY: suspend=true ({CL}) does not go with iocm=true; leave one of the two out", config=SITE_HAS_ALL + FOLDER),
    wrong("suspend=on,unclot=on", f"VT-POLICY: suspend=true ({CL}) does not go with unclot=true; leave one of the two out", config=SITE_HAS_ALL + FOLDER),
    wrong("iocm_min_cores=1", f"VT-KEY: iocm_min_cores ({CL}) means nothing without iocm; add iocm=true", config=SITE_HAS_ALL),
    wrong("iocm=true,iocm_max_cores=65", f"VT-POLICY: iocm_max_cores=65 ({CL}) is above the maximum 64; 0 to 64 is allowed (the built-in default)", config=SITE_HAS_ALL),
    wrong("iocm=true,iocm_min_cores=3,iocm_max_cores=2", f"VT-POLICY: iocm_min_cores=3 ({CL}) is above iocm_max_cores=2; give a range", config=SITE_HAS_ALL),
    wrong("unclot_shmem=64M", f"VT-KEY: unclot_shmem ({CL}) means nothing without unclot; add unclot=true"),
    wrong("vm_prologue=job.sh", f"VT-POLICY: vm_prologue=job.sh ({CL}) is refused; vm_prologue is switched off here (policy.vm_prologue.enabled, <config> line 3)", config=policy("vm_prologue: {enabled: false}")),
    wrong("vcpus=2", f"VT-POLICY: vcpus=2 ({CL}) is refused; vcpus is switched off here (policy.vcpus.enabled, <config> line 3)", config="policy: {img: {default: micro}, vcpus: {enabled: false}}\n"),
    wrong("vrdma=true", f"VT-POLICY: vrdma=true ({CL}) is refused; vrdma is switched off here (policy.vrdma.enabled, <config> line 3, policy.users.carol.vrdma.enabled)", config=policy("users: {carol: {vrdma: {enabled: false}}}") + HAS_ALL),
    refused("job.sh", "VT-IMAGE: no image is asked for and the site sets no default (policy.img.default); add -vm img=NAME, or -vm off for a job without guests", config="policy: {vcpus: {max: 8}}\n"),
]

# ---------------------------------------------------------------- what the job asks of its nodes


def sum_of(vcpus: int, guests: int = 1, host: int = 0, io: int = 0) -> str:
    total = host + vcpus * guests + io
    return f"{host} host cores + {vcpus} vCPUs * {guests} guests + {io} I/O cores = {total} processors on each node"


def memory_of(ram: str, total: str, guests: int = 1, shared: str = "0M") -> str:
    return f"256M host memory + {ram} RAM * {guests} guests + {shared} shared memory = {total} on each node"


RAISE = policy("raise_requests: true")
NODES = policy("nodes: {max: 8}, vms_per_node: {max: 4}")
HOST = policy("nodes: {max: 8}, vms_per_node: {max: 4}") + "resources: {host_cores: 1, host_memory: 1G}\n"


def two(amount: int = 2) -> dict[str, Any]:
    return {"vcpus": amount}


RESOURCES = [
    # open: asked for
    guest("-l nodes=1 job.sh", "-l nodes=1"),
    guest("-l nodes=1 -vm vcpus=2 job.sh", wanted="nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), **two()}),
    guest("-l walltime=60,nodes=1 -vm vcpus=2 job.sh", "-l walltime=60", "nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), **two()}),
    guest("-l nodes=1:fast:big -vm vcpus=2 job.sh", wanted="nodes=1:ppn=2:fast:big mem=768mb", spec={"asked": ("vcpus",), **two()}),
    guest("-l nodes=node7 -vm vcpus=2 job.sh", wanted="nodes=node7:ppn=2 mem=768mb", spec={"asked": ("vcpus",), **two()}),
    guest("-l nodes=fast#shared -vm vcpus=2 job.sh", wanted="nodes=fast:ppn=2#shared mem=768mb", spec={"asked": ("vcpus",), **two()}),
    guest("-l nodes=node7:ppn=2 job.sh", "-l nodes=node7:ppn=2", spec=two()),
    guest("-l nodes=1#shared job.sh", "-l nodes=1#shared"),
    guest("-l nodes=1:ppn=2:fast job.sh", "-l nodes=1:ppn=2:fast", spec=two()),
    guest("-l nodes=2 -l nodes=1 job.sh", "-l nodes=2 -l nodes=1"),
    guest("-l procs=1 job.sh", wanted="nodes=1:ppn=1 mem=768mb", err=f"vsub: note: -l procs=1 ({CL}) is asked for as nodes=1:ppn=1, because a guest is on one node\n"),
    guest("-l procs=4 job.sh", wanted="nodes=1:ppn=4 mem=768mb", spec=two(4), err=f"vsub: note: -l procs=4 ({CL}) is asked for as nodes=1:ppn=4, because a guest is on one node\n"),
    guest("-l ncpus=2 job.sh", "-l ncpus=2", spec=two()),
    guest("-l ncpus=2 -vm vcpus=1 job.sh", "-l ncpus=2", spec={"asked": ("vcpus",)}),
    guest("-L tasks=1 job.sh", "-L tasks=1:memory=768mb", ""),
    guest("-L tasks=1:lprocs=4 job.sh", "-L tasks=1:lprocs=4:memory=768mb", "", spec=two(4)),
    guest("-L tasks=1:lprocs=all:place=node job.sh", "-L tasks=1:lprocs=all:place=node:memory=768mb", ""),
    guest("-L tasks=1:place=node:lprocs=all -vm vcpus=2 job.sh", "-L tasks=1:place=node:lprocs=all:memory=768mb", "", spec={"asked": ("vcpus",), **two()}),
    guest("-L tasks=1:usecores:place=socket -vm vcpus=2 job.sh", "-L tasks=1:usecores:place=socket:lprocs=2:memory=768mb", "", spec={"asked": ("vcpus",), **two()}),
    guest("-L tasks=1:lprocs=2:memory=2gb job.sh", "-L tasks=1:lprocs=2:memory=2gb", "", spec={"vcpus": 2, "ram_mib": 1792}),
    # given: the defaults grow and shrink
    guest("-l nodes=1:ppn=4 job.sh", "-l nodes=1:ppn=4", spec=two(4)),
    guest("-l nodes=1:ppn=16 job.sh", "-l nodes=1:ppn=16", spec=two(8)),
    guest("-l nodes=1:ppn=4 -vm vcpus=2 job.sh", "-l nodes=1:ppn=4", spec={"asked": ("vcpus",), **two()}),
    guest("-l nodes=1:ppn=4 job.sh", "-l nodes=1:ppn=4", config=policy("grow_defaults: false")),
    guest("-l nodes=1:ppn=2 job.sh", "-l nodes=1:ppn=2", config="policy: {img: {default: micro}, vcpus: {max: 8, default: 4}}\n", spec=two()),
    guest("-l mem=1gb job.sh", "-l mem=1gb", "", spec={"ram_mib": 768}),
    guest("-l mem=512mb job.sh", "-l mem=512mb", "", spec={"ram_mib": 256}),
    guest("-l mem=524288kb job.sh", "-l mem=524288kb", "", spec={"ram_mib": 256}),
    guest("-l mem=536870912 job.sh", "-l mem=536870912", "", spec={"ram_mib": 256}),
    guest("-l mem=64mw job.sh", "-l mem=64mw", "", spec={"ram_mib": 256}),
    guest("-l mem=64gb job.sh", "-l mem=64gb", "", spec={"ram_mib": 4096}),
    guest("-l mem=64gb job.sh", "-l mem=64gb", "", config=policy("grow_defaults: false")),
    guest("-l mem=4gb -vm ram=1G job.sh", "-l mem=4gb", "", spec={"asked": ("ram",), "ram_mib": 1024}),
    guest("-l pmem=1gb job.sh", "-l pmem=1gb", "", spec={"ram_mib": 768}),
    guest("-l nodes=1:ppn=2,pmem=1gb job.sh", "-l nodes=1:ppn=2,pmem=1gb", "", spec={"vcpus": 2, "ram_mib": 1792}),
    guest("-l vmem=2gb job.sh", "-l vmem=2gb", "", spec={"ram_mib": 1792}),
    guest("-l pvmem=2gb job.sh", "-l pvmem=2gb", "", spec={"ram_mib": 1792}),
    guest("-l mem=2gb,vmem=1gb job.sh", "-l mem=2gb,vmem=1gb", "", spec={"ram_mib": 768}),
    script("-l mem=1gb job.sh", "#PBS -l mem=300mb\n", "-l mem=300mb -l mem=1gb", wanted="", spec={"ram_mib": 768}),
    # too small: refused with the sum
    refused("-l nodes=1:ppn=1 -vm vcpus=2 job.sh", f"VT-RESOURCE: vcpus=2 ({CL}) needs {sum_of(2)}, and ppn=1 ({CL}) gives 1; ask for at least 2 on each node, or for vcpus=1"),
    refused("job.sh", f"VT-RESOURCE: vcpus=4 (job.sh line 2) needs {sum_of(4)}, and ppn=2 (job.sh line 1) gives 2; ask for at least 4 on each node, or for vcpus=2", script=b"#PBS -l nodes=1:ppn=2\n#PBS -vm vcpus=4\n"),
    refused("-l ncpus=1 -vm vcpus=2 job.sh", f"VT-RESOURCE: vcpus=2 ({CL}) needs {sum_of(2)}, and ncpus=1 ({CL}) gives 1; ask for at least 2 on each node, or for vcpus=1"),
    refused("-l procs=1 -vm vcpus=2 job.sh", f"VT-RESOURCE: vcpus=2 ({CL}) needs {sum_of(2)}, and procs=1 ({CL}) gives 1; ask for at least 2 on each node, or for vcpus=1"),
    refused("-L tasks=1:lprocs=1 -vm vcpus=2 job.sh", f"VT-RESOURCE: vcpus=2 ({CL}) needs {sum_of(2)}, and lprocs=1 ({CL}) gives 1; ask for at least 2 on each node, or for vcpus=1"),
    refused("-l mem=300mb job.sh", f"VT-RESOURCE: ram=128M, the least, needs {memory_of('128M', '384M')}, and mem=300mb ({CL}) gives 300M; ask for at least 384M on each node"),
    refused("-l mem=1gb -vm ram=1G job.sh", f"VT-RESOURCE: ram=1G ({CL}) needs {memory_of('1G', '1280M')}, and mem=1gb ({CL}) gives 1G; ask for at least 1280M on each node, or for ram=768M"),
    refused("-vm img=debian-12 -l mem=512mb job.sh", f"VT-RESOURCE: ram=384M, the least, needs {memory_of('384M', '640M')}, and mem=512mb ({CL}) gives 512M; ask for at least 640M on each node"),
    refused("-l pmem=300mb job.sh", f"VT-RESOURCE: ram=128M, the least, needs {memory_of('128M', '384M')}, and pmem=300mb ({CL}) gives 300M; ask for at least 384M on each node"),
    refused("-L tasks=1:memory=300mb job.sh", f"VT-RESOURCE: ram=128M, the least, needs {memory_of('128M', '384M')}, and memory=300mb ({CL}) gives 300M; ask for at least 384M on each node"),
    # too small: raised where the site says so
    guest("-l nodes=1:ppn=1 -vm vcpus=2 job.sh", wanted="nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), **two()}, config=RAISE, err=f"vsub: note: ppn=1 ({CL}) is raised: vcpus=2 ({CL}) needs {sum_of(2)}\n"),
    guest("-l walltime=60,ncpus=1 -vm vcpus=2 job.sh", "-l walltime=60", "nodes=1:ppn=2 mem=768mb", spec={"asked": ("vcpus",), **two()}, config=RAISE, err=f"vsub: note: ncpus=1 ({CL}) is raised: vcpus=2 ({CL}) needs {sum_of(2)}\n"),
    guest("-L tasks=1:lprocs=1:usecores -vm vcpus=2 job.sh", "-L tasks=1:lprocs=2:usecores:memory=768mb", "", spec={"asked": ("vcpus",), **two()}, config=RAISE, err=f"vsub: note: lprocs=1 ({CL}) is raised: vcpus=2 ({CL}) needs {sum_of(2)}\n"),
    guest("-l mem=300mb job.sh", "", "mem=384mb", spec={"ram_mib": 128}, config=RAISE, err=f"vsub: note: mem=300mb ({CL}) is raised: ram=128M, the least, needs {memory_of('128M', '384M')}\n"),
    guest("-l mem=1gb,walltime=60 -vm ram=1G job.sh", "-l walltime=60", "mem=1280mb", spec={"asked": ("ram",), "ram_mib": 1024}, config=RAISE, err=f"vsub: note: mem=1gb ({CL}) is raised: ram=1G ({CL}) needs {memory_of('1G', '1280M')}\n"),
    guest("-l nodes=1:ppn=2,pmem=100mb -vm ram=1G job.sh", "-l nodes=1:ppn=2", "pmem=640mb", spec={"asked": ("ram",), "vcpus": 2, "ram_mib": 1024}, config=RAISE, err=f"vsub: note: pmem=100mb ({CL}) is raised: ram=1G ({CL}) needs {memory_of('1G', '1280M')}\n"),
    guest("-l mem=4gb,vmem=1gb -vm ram=1G job.sh", "-l mem=4gb", "vmem=1280mb", spec={"asked": ("ram",), "ram_mib": 1024}, config=RAISE, err=f"vsub: note: vmem=1gb ({CL}) is raised: ram=1G ({CL}) needs {memory_of('1G', '1280M')}\n"),
    guest("-l nodes=1:ppn=2 job.sh", "-l nodes=1:ppn=2", spec=two(), config=RAISE),
    # what the node keeps for itself, several nodes, several guests
    guest("job.sh", wanted="nodes=1:ppn=2 mem=1536mb", config=HOST),
    guest("-l nodes=1:ppn=4,mem=4gb job.sh", "-l nodes=1:ppn=4,mem=4gb", "", spec={"vcpus": 3, "ram_mib": 3072}, config=HOST),
    guest("-l nodes=1:ppn=7,mem=5gb -vm vms_per_node=2 job.sh", "-l nodes=1:ppn=7,mem=5gb", "", spec={"asked": ("vms_per_node",), **TOGETHER, "per_node": 2, "vcpus": 3, "ram_mib": 2048}, config=HOST),
    refused("-l nodes=1:ppn=1 job.sh", f"VT-RESOURCE: vcpus=1, the least, needs {sum_of(1, host=1)}, and ppn=1 ({CL}) gives 1; ask for at least 2 on each node", config=HOST),
    guest("-l nodes=2 job.sh", "-l nodes=2", "mem=1536mb", spec=TOGETHER, config=NODES),
    guest("-l nodes=2 job.sh", "-l nodes=2", "mem=1536mb", spec=TOGETHER, config=policy("network: {enabled: false}")),
    guest("-l nodes=2 job.sh", "-l nodes=2", "mem=1536mb", config=policy("network: {several: null}")),
    guest("-l nodes=2 job.sh", "-l nodes=2", "mem=1536mb", config=policy("network: {allowed: [user]}")),
    guest("-l nodes=2 job.sh", "-l nodes=2", "mem=1536mb", spec={"network": "bridge"}, config=policy("network: {allowed: [user, bridge, job], several: bridge}")),
    guest("-l nodes=2 -vm network=user job.sh", "-l nodes=2", "mem=1536mb", spec={"asked": ("network",)}, config=NODES),
    refused("-l nodes=2 -vm network=user job.sh", f"VT-POLICY: network=user ({CL}) is refused; network is switched off here (policy.network.enabled, <config> line 3)", config=policy("network: {enabled: false}")),
    guest("-l nodes=2 -vm vcpus=2,vms_per_node=2 job.sh", "", "nodes=2:ppn=4 mem=2560mb", spec={"asked": ("vcpus", "vms_per_node"), **TOGETHER, "vcpus": 2, "per_node": 2}, config=NODES),
    guest("-l nodes=2:ppn=2+1:ppn=4:big job.sh", "-l nodes=2:ppn=2+1:ppn=4:big", "mem=2304mb", spec={**two(), **TOGETHER}, config=NODES),
    guest("-l nodes=n1+n2:ppn=4 job.sh", "", "nodes=n1:ppn=4+n2:ppn=4 mem=1536mb", spec={**two(4), **TOGETHER}, config=NODES),
    guest("-l nodes=n1:ppn=2+n2:ppn=4,mem=4gb job.sh", "-l nodes=n1:ppn=2+n2:ppn=4,mem=4gb", "", spec={"vcpus": 2, "ram_mib": 1792, **TOGETHER}, config=NODES),
    guest("-l nodes=2:ppn=1+1:ppn=4 -vm vcpus=2 job.sh", "", "nodes=2:ppn=2+1:ppn=4 mem=2304mb", spec={"asked": ("vcpus",), **two(), **TOGETHER}, config=policy("nodes: {max: 8}, raise_requests: true"), err=f"vsub: note: ppn=1 ({CL}) is raised: vcpus=2 ({CL}) needs {sum_of(2)}\n"),
    refused("-l nodes=1025 job.sh", f"VT-POLICY: -l nodes=1025 ({CL}) asks for 1025 nodes with guests; 1 to 1024 is allowed (the built-in default)"),
    refused("-l nodes=a:ppn=2+b job.sh", f"VT-POLICY: -l nodes=a:ppn=2+b ({CL}) asks for 2 nodes with guests; 1 to 1 is allowed (<config> line 3)", config=policy("nodes: {max: 1}")),
    refused("-l nodes=9 job.sh", f"VT-POLICY: -l nodes=9 ({CL}) asks for 9 nodes with guests; 1 to 8 is allowed (<config> line 3)", config=NODES),
    refused("job.sh", "VT-POLICY: the job asks for 1 nodes with guests; 2 to 8 is allowed (<config> line 3)", config=policy("nodes: {min: 2, max: 8}")),
    # who may share the nodes
    guest("-l naccesspolicy=singlejob job.sh", "-l naccesspolicy=singlejob", access=None),
    guest("-W x=NACCESSPOLICY:SINGLEJOB job.sh", "-W x=NACCESSPOLICY:SINGLEJOB", access=None),
    guest("job.sh", access=None, submit=", node_access: null"),
    guest("job.sh", access="singleuser", submit=", node_access: singleuser"),
    # the type of guest jobs
    guest("job.sh", job_type="vtorque", submit=", job_type: vtorque"),
    guest("-I -x job.sh", spec={"interactive": True, "keep": True}, job_type="vm", submit=", job_type: vm", result='{"v": 1, "status": 7, "code": null}', status=7),
    unhonoured("-T vtorque job.sh", "-T vtorque", "vTorque's own hooks must run, and those of another name would run in their place", submit=", job_type: vtorque"),
    plain("-vm off job.sh", "job.sh", submit=", job_type: vtorque"),
    plain("-vm off -T own job.sh", "-T own job.sh", submit=", job_type: vtorque"),
    # what no guest job can ask for
    refused("-l nodes=1 -l procs=2 job.sh", "VT-OPTION: -l nodes=1 and -l procs=2 cannot both be honoured in a guest job; say nodes=N:ppn=M"),
    refused("-l ncpus=2 -L tasks=1 job.sh", "VT-OPTION: -l ncpus=2 and -L tasks=1 cannot both be honoured in a guest job; say nodes=N:ppn=M"),
    refused("-L tasks=1 -L tasks=1:lprocs=2 job.sh", "VT-OPTION: -L tasks=1 and -L tasks=1:lprocs=2 cannot both be honoured in a guest job; say nodes=N:ppn=M"),
    refused("-L tasks=2:lprocs=1 job.sh", f"VT-OPTION: -L tasks=2:lprocs=1 ({CL}) cannot be honoured in a guest: tasks may share a node; say -l nodes=N:ppn=M"),
    refused("-L nonsense job.sh", f"VT-USAGE: illegal -L value 'nonsense' ({CL}); tasks=N[:…]"),
    refused("-L tasks=1:lprocs=0 job.sh", f"VT-USAGE: -L tasks=1:lprocs=0 ({CL}) cannot be read; lprocs=N, memory=SIZE"),
    refused("-l nodes=0 job.sh", f"VT-USAGE: nodes=0 ({CL}) cannot be read: '0'; write nodes=N:ppn=M or nodes=HOST:ppn=M, several joined by +"),
    refused("-l nodes=12345678901 job.sh", f"VT-USAGE: nodes=12345678901 ({CL}) cannot be read: 12345678901 is no number of nodes; write nodes=N:ppn=M"),
    refused("-l nodes=1:ppn=x job.sh", f"VT-USAGE: nodes=1:ppn=x ({CL}) cannot be read: '1:ppn=x'; write nodes=N:ppn=M or nodes=HOST:ppn=M, several joined by +"),
    refused("-l nodes=1++a job.sh", f"VT-USAGE: nodes=1++a ({CL}) cannot be read: ''; write nodes=N:ppn=M or nodes=HOST:ppn=M, several joined by +"),
    refused("-l procs=x job.sh", f"VT-USAGE: procs=x ({CL}) cannot be read; a number from 1 is needed"),
    refused("-l mem=lots job.sh", f"VT-USAGE: mem=lots ({CL}) cannot be read; such as 2gb"),
    unhonoured("-l gpus=1 job.sh", "-l gpus=1", "gpus: guests get no GPUs of the node"),
    unhonoured("-l nodes=1:gpus=1 job.sh", "-l nodes=1:gpus=1", "nodes: guests get no devices of the node"),
    unhonoured("-l nodes=1:ppn=1:mics=1 job.sh", "-l nodes=1:ppn=1:mics=1", "nodes: guests get no devices of the node"),
    unhonoured("-l gpus:shared=1 job.sh", "-l gpus:shared=1", "gpus:shared: guests get no GPUs of the node"),
    unhonoured("-l mics=1 job.sh", "-l mics=1", "mics: guests get no accelerators of the node"),
    unhonoured("-l gres=gpus:1 job.sh", "-l gres=gpus:1", "gres: guests get no GPUs of the node"),
    guest("-l gres=matlab:1 job.sh", "-l gres=matlab:1"),
    unhonoured("-l nice=5 job.sh", "-l nice=5", "nice: a guest's processes do not compete with those of the node"),
    unhonoured("-l size=4 job.sh", "-l size=4", "size: say nodes="),
    unhonoured("-l neednodes=a job.sh", "-l neednodes=a", "neednodes: say nodes="),
    unhonoured("-l walltime=60,mppwidth=4 job.sh", "-l walltime=60,mppwidth=4", "mppwidth: say nodes="),
]

# ---------------------------------------------------------------- jobs without guests

BARE = ", without_vm: qsub"
OFF = [
    plain("-vm off job.sh", "job.sh"),
    plain("job.sh -vm off -lnodes=2 -l gpus=1", "job.sh -lnodes=2 -l gpus=1"),
    plain("-vm off -hVN 'a b' job.sh", ["-hVN", "a b", "job.sh"]),
    plain("-vm off -Y job.sh -N", "-Y job.sh -N"),
    plain(["-vm", "off", "-v", "A=a b\nc", "job.sh"], ["-v", "A=a b\nc", "job.sh"]),
    plain("-v m -vm off job.sh", "-v m job.sh"),
    plain("-vm off -- job.sh -vm", "-- job.sh -vm"),
    plain("-vm off -vm off job.sh", "job.sh"),
    plain("-vm off -I -x job.sh", "-I -x job.sh"),
    plain("-vm off -T other -X -P dave -t 1-3 job.sh", "-T other -X -P dave -t 1-3 job.sh"),
    plain("-vm off missing", "missing", qsub=("", "qsub: script file 'missing' cannot be loaded - No such file or directory\n", 1), out="", err="qsub: script file 'missing' cannot be loaded - No such file or directory\n", status=1),
    plain("-vm off -q a", "-q a", stdin=b"#PBS -q b\r\n\xff\0"),
    plain("-vm off", "", stdin=b""),
    plain("-vm off -C#Q job.sh", "-C#Q job.sh", script=Q),
    plain("job.sh", "job.sh", script=b"#PBS -vm off\ntrue\n"),
    plain("-N x job.sh", "-v A=1 -N x job.sh", script=b"#PBS -v A=1\n#PBS -vm off\n"),  # qsub reads the last as -v m
    plain("-v B job.sh", "-v B job.sh", script=b"#PBS -v A=1\n#PBS -vm off\n"),
    plain("-q a", "-q a", stdin=b"#PBS -vm off\necho\n"),
    plain("job.sh", "job.sh", submit=BARE),
    plain("", "", stdin=b"echo\n", submit=BARE),
    plain("-t 1-3 -N x job.sh", "-t 1-3 -N x job.sh", submit=BARE),
    plain("-Y job.sh", "-Y job.sh", submit=BARE),
    plain("job.sh", "job.sh", script=b"#PBS -N 'open\n", submit=BARE),
    plain("-I", "-I", submit=BARE),
    guest("-vm vcpus=1 job.sh", spec={"asked": ("vcpus",)}, submit=BARE),
    guest("job.sh", script=b"#PBS -vm vcpus=1\n", spec={"asked": ("vcpus",)}, submit=BARE),
    guest("", name="STDIN", stdin=b"#PBS -vm ram=512M\n", spec={"asked": ("ram",)}, submit=BARE),
    plain("--about", "--about"),
    plain("-q a --about job.sh", "-q a --about job.sh"),
    plain("-vm vcpus=2 --about", "--about"),
    plain("-vm off job.sh", "job.sh", submit=", disabled_hosts: ['*']"),
    refused("job.sh", "VT-POLICY: guest jobs may not be submitted from <host>; submit.disabled_hosts, <config> line 1; submit elsewhere, or add -vm off", submit=", disabled_hosts: [login9, '*']"),
    guest("job.sh", submit=", disabled_hosts: [login9]"),
    Row(["--dry-run", "-vm", "off", "-N", "a b", "job.sh"], None, None, "", 0, "<qsub> -N 'a b' job.sh\n"),
    Row(["-gf", "-vm", "off", "job.sh"], None, None, "", 0, "<qsub> job.sh\n"),
    Row(["--explain", "-vm", "off", "job.sh"], None, None, "", 0, f"guest  off  -vm off ({CL})\n"),
    Row(["--json", "--dry-run", "-vm", "off", "job.sh"], None, None, "", 0, '{"guest": false, "source": "-vm off (the command line)", "argv": ["<qsub>", "job.sh"], "files": []}\n'),
    Row(["--explain", "job.sh"], None, None, "", 0, "guest  off  <config> line 1\n", submit=BARE),
    Row(["--json", "-vm", "off", "job.sh"], ["job.sh"], None, "", 0, '{"job": "12.host", "guest": false, "status": 0, "directory": null, "argv": ["<qsub>", "job.sh"]}\n'),
]

# ---------------------------------------------------------------- qsub that fails, and what vsub says of itself

FAILED = "qsub: submit error (Unauthorized Request  MSG=acl)\n"
ENDS = [
    guest("job.sh", qsub=("", FAILED, 159), out="", err=FAILED, status=159),
    guest("-q a job.sh", "-q a", qsub=("some output\n", "", 1), out="some output\n", status=1),
    guest("-z job.sh", qsub=("", FAILED, 188), out="", err=FAILED, status=188),
    guest("job.sh", qsub=(JOB_ID, "qsub: a warning\n", 0), err="qsub: a warning\n"),
    plain("-vm off job.sh", "job.sh", qsub=("half\n", FAILED, 5), out="half\n", err=FAILED, status=5),
    Row(["--json", "-vm", "vcpus=99", "job.sh"], None, None, f"vsub: VT-POLICY: vcpus=99 ({CL}) is above the maximum 8; 1 to 8 is allowed (<config> line 3)\n", 2, '{"error": {"code": "VT-POLICY", "message": "vcpus=99 (the command line) is above the maximum 8; 1 to 8 is allowed (<config> line 3)", "status": 2}}\n'),
    refused("--wait -z job.sh", f"VT-OPTION: --wait cannot be combined with -z ({CL}): it hides the job's id"),
]

TABLE: dict[str, list[Row]] = {
    "letters": LETTERS, "forms": FORMS, "prefixes": PREFIXES, "directives": DIRECTIVES, "stdin": STDIN,
    "interactive": INTERACTIVE, "attributes": ATTRIBUTES, "hooks": HOOKS, "precedence": PRECEDENCE, "keys": KEYS,
    "resources": RESOURCES, "off": OFF, "ends": ENDS,
}  # fmt: skip
ROWS = [(f"{part}: {row.name}", row) for part, rows in TABLE.items() for row in rows]
