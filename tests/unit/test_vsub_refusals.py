"""What is refused at submission: one line that names value, bound and place; nothing submitted, nothing left."""
# ruff: noqa: E501 (a row of a table is a line)

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest
from vsubsite import Outcome, Runner, Site

from vmgr.errors import Code, VTorqueError
from vsub.account import account

CONFIG = "{config}"
COMMAND = "the command line"
KEYS = "off, " + ", ".join(f"{key}=VALUE" for key in (
    "img", "distro", "arch", "vcpus", "ram", "vms_per_node", "vcpu_pinning", "fs_type", "disk", "vm_prologue",
    "vm_epilogue", "metadata", "network", "mounts", "suspend", "iocm", "iocm_min_cores", "iocm_max_cores", "vrdma", "unclot",
    "unclot_shmem",
))  # fmt: skip

POLICY = [
    ("-vm vcpus=9 job.sh", f"vsub: VT-POLICY: vcpus=9 ({COMMAND}) is above the maximum 8; 1 to 8 is allowed ({CONFIG} line 3)"),
    ("-vm vcpus=0 job.sh", f"vsub: VT-POLICY: vcpus=0 ({COMMAND}) is below the minimum 1; 1 to 8 is allowed (the built-in default)"),
    ("-vm ram=64M job.sh", f"vsub: VT-POLICY: ram=64M ({COMMAND}) is below the minimum 128M; 128M to 4G is allowed (the built-in default)"),
    ("-vm ram=5G job.sh", f"vsub: VT-POLICY: ram=5G ({COMMAND}) is above the maximum 4G; 128M to 4G is allowed ({CONFIG} line 3)"),
    ("-vm vms_per_node=17 job.sh", f"vsub: VT-POLICY: vms_per_node=17 ({COMMAND}) is above the maximum 16; 1 to 16 is allowed (the built-in default)"),
    ("-vm cpus=2 job.sh", f"vsub: VT-KEY: unknown request in {COMMAND}: the key 'cpus'; allowed: {KEYS}"),
    ("-vm vcpus job.sh", f"vsub: VT-VALUE: vcpus in {COMMAND} has no value; write vcpus=VALUE"),
    ("-vm vcpus=two job.sh", f"vsub: VT-VALUE: vcpus=two in {COMMAND} cannot be read; a whole number is needed"),
    ("-vm ram=1.3M job.sh", f"vsub: VT-VALUE: ram=1.3M in {COMMAND} cannot be read; a size such as 2048M or 1.5G (a whole number of MiB) is needed"),
    ("-vm img= job.sh", f"vsub: VT-VALUE: img in {COMMAND} has no value; write img=VALUE"),
    ("-vm img=suse job.sh", f"vsub: VT-IMAGE: img=suse ({COMMAND}): unknown image 'suse' in the pool {{pool}}; images: debian-12, micro"),
    ("-vm img=a/x job.sh", f"vsub: VT-IMAGE: img=a/x ({COMMAND}): unknown image 'a/x' in the pool {{pool}}; images: debian-12, micro"),
    ("-vm img=micro@2 job.sh", f"vsub: VT-IMAGE: img=micro@2 ({COMMAND}): image micro has no revision 2; revisions: 1"),
    ("-vm img=/x job.sh", f"vsub: VT-POLICY: img=/x ({COMMAND}) is a disk of your own; those are not allowed (images.allow_user_images, the built-in default)"),
    ("-vm distro=redhat job.sh", f"vsub: VT-IMAGE: distro=redhat ({COMMAND}) does not describe the image micro; it is micro (SLG); distro= asserts, img= selects"),
    ("-vm img=debian-12,ram=256M job.sh", f"vsub: VT-POLICY: ram=256M ({COMMAND}) is less than the image debian-12 needs; at least 384M (the image's description in {{pool}})"),
    ("-vm vcpus=2 -vm vcpus=3 job.sh", f"vsub: VT-KEY: vcpus is asked for twice: 2 ({COMMAND}) and 3 ({COMMAND}, -vm no. 2); give it once"),
    ("-vm off -vm vcpus=3 job.sh", f"vsub: VT-KEY: -vm off ({COMMAND}) and -vm vcpus=3 ({COMMAND}, -vm no. 2) exclude each other"),
    ("in-script.sh", f"vsub: VT-POLICY: vcpus=99 (in-script.sh line 2) is above the maximum 8; 1 to 8 is allowed ({CONFIG} line 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), POLICY, ids=[row[0] for row in POLICY])
def test_policy(site: Site, vsub_run: Runner, line: str, message: str) -> None:
    site.script()
    site.script("#!/bin/sh\n#PBS -vm vcpus=99\n", "in-script.sh")
    outcome = vsub_run(*line.split())
    message = message.replace("{config}", str(site.install.config)).replace("{pool}", str(site.pool))
    assert outcome == (2, "", message + "\n")
    assert not site.called and site.left_in_home() == []


HINT = "; leave it out, or add -vm off"
UNHONOURED = [
    ("-X job.sh", "-X", "X11 is not forwarded from guests"),
    ("-T other job.sh", "-T other", "vTorque's own hooks must run, and those of another name would run in their place"),
    ("-W jobtype=other job.sh", "-W jobtype=other", "vTorque's own hooks must run, and those of another name would run in their place"),
    ("-P dave job.sh", "-P dave", "a guest job is submitted by its own user"),
    ("-W proxy_user=dave job.sh", "-W proxy_user=dave", "a guest job is submitted by its own user"),
    ("-J 1 job.sh", "-J 1", "a guest job is submitted by its own user"),
    ("-D /root job.sh", "-D /root", "the root folder of a guest is its own"),
    ("-W init_work_dir=/tmp job.sh", "-W init_work_dir=/tmp", "write it as -w"),
    ("-W Job_Name=x job.sh", "-W Job_Name=x", "write it as -N"),
    ("-W job_arguments=x job.sh", "-W job_arguments=x", "write it as -F"),
    ("-u dave job.sh", "-u dave", "a guest job runs as the user who submits it, carol"),
    ("-u carol,dave@host job.sh", "-u carol,dave@host", "a guest job runs as the user who submits it, carol"),
    ("-W group_list=chem job.sh", "-W group_list=chem", "a guest job runs with the primary group of its user, users"),
    ("-c enabled job.sh", "-c enabled", "a guest is not checkpointed by the batch system"),
    ("-c n,shutdown job.sh", "-c n,shutdown", "a guest is not checkpointed by the batch system"),
    ("-l gpus=1 job.sh", "-l gpus=1", "gpus: guests get no GPUs of the node"),
    ("-l mics=1 job.sh", "-l mics=1", "mics: guests get no accelerators of the node"),
    ("-l nodes=1:gpus=1 job.sh", "-l nodes=1:gpus=1", "nodes: guests get no devices of the node"),
    ("-l nodes=1:ppn=2+a:mics=1 job.sh", "-l nodes=1:ppn=2+a:mics=1", "nodes: guests get no devices of the node"),
    ("-l gres=gpus:1 job.sh", "-l gres=gpus:1", "gres: guests get no GPUs of the node"),
    ("-l nice=5 job.sh", "-l nice=5", "nice: a guest's processes do not compete with those of the node"),
    ("-l size=4 job.sh", "-l size=4", "size: say nodes="),
    ("-l neednodes=a job.sh", "-l neednodes=a", "neednodes: say nodes="),
    ("-l mppwidth=4 job.sh", "-l mppwidth=4", "mppwidth: say nodes="),
    ("-l walltime=60,mppnodes=a job.sh", "-l walltime=60,mppnodes=a", "mppnodes: say nodes="),
]  # fmt: skip


@pytest.mark.parametrize(("line", "option", "reason"), UNHONOURED, ids=[row[0] for row in UNHONOURED])
def test_unhonoured_options(site: Site, vsub_run: Runner, line: str, option: str, reason: str) -> None:
    site.script()
    outcome = vsub_run(*line.split())
    message = f"vsub: VT-OPTION: {option} ({COMMAND}) cannot be honoured in a guest: {reason}{HINT}\n"
    assert outcome == (2, "", message)
    assert not site.called and site.left_in_home() == []


def test_unhonoured_directive_names_its_line(site: Site, vsub_run: Runner) -> None:
    site.script("#!/bin/sh\n\n#PBS -T other\ntrue\n")
    assert "-T other (job.sh line 3) cannot be honoured" in vsub_run("job.sh").stderr
    assert not site.called and site.left_in_home() == []


USAGE = [
    ("-g job.sh", f"the option -g is not known ({COMMAND})"),
    ("-Vg job.sh", f"the option -g is not known ({COMMAND})"),
    ("--nonsense job.sh", f"the option --nonsense is not known ({COMMAND})"),
    ("job.sh -N", f"the option -N has no value ({COMMAND})"),
    ("job.sh other.sh", "one script can be submitted, not also 'other.sh'"),
    ("job.sh -vm", f"-vm ({COMMAND}) has no value"),
    ("-C#Q job.sh", f"qsub takes the word after -C#Q for the prefix: write -C #Q apart ({COMMAND})"),
    ("-x job.sh", f"-x ({COMMAND}) goes with -I only; add -I, or leave it out"),
    ("-I -x", f"-x ({COMMAND}) names no script; write vsub -I -x SCRIPT"),
    ("-I job.sh", "standard input and output must be a terminal for an interactive job; submit a script without -I"),
    ("-W interactive=true job.sh", "standard input and output must be a terminal for an interactive job"),
    ("-I -t 1-2 job.sh", "an interactive job cannot be a job array (-t 1-2); leave one out"),
    ("-t x job.sh", f"'x' ({COMMAND}) is no request of a job array; write -t 1-4, -t 0,3,7-9 or -t 1-100%10"),
    ("-t 3-1 job.sh", f"'3-1' ({COMMAND}) is no request of a job array"),
    ("-t 0-9999999 job.sh", f"'0-9999999' ({COMMAND}) is no request of a job array"),
    ("-l walltime job.sh", f"illegal -l value 'walltime' ({COMMAND}): 'walltime' has no value"),
    ("-l a=1, job.sh", f"illegal -l value 'a=1,' ({COMMAND}): it ends with a comma"),
    ("-l =1 job.sh", f"illegal -l value '=1' ({COMMAND}): an item has no name"),
    ("-l nodes= job.sh", f"nodes= ({COMMAND}) cannot be read: ''; write nodes=N:ppn=M"),
    ("-l nodes=0 job.sh", f"nodes=0 ({COMMAND}) cannot be read: '0'"),
    ("-l nodes=1:ppn=x job.sh", f"nodes=1:ppn=x ({COMMAND}) cannot be read: '1:ppn=x'"),
    ("-l nodes=1:ppn=0 job.sh", f"nodes=1:ppn=0 ({COMMAND}) cannot be read"),
    ("-l nodes=1++2 job.sh", f"nodes=1++2 ({COMMAND}) cannot be read: ''"),
    ("-l procs=x job.sh", f"procs=x ({COMMAND}) cannot be read; a number from 1 is needed"),
    ("-l ncpus=0 job.sh", f"ncpus=0 ({COMMAND}) cannot be read; a number from 1 is needed"),
    ("-l mem=lots job.sh", f"mem=lots ({COMMAND}) cannot be read; such as 2gb"),
    ("-L nonsense job.sh", f"illegal -L value 'nonsense' ({COMMAND}); tasks=N[:…]"),
    ("-L tasks=1:lprocs=0 job.sh", f"-L tasks=1:lprocs=0 ({COMMAND}) cannot be read; lprocs=N, memory=SIZE"),
]


@pytest.mark.parametrize(("line", "text"), USAGE, ids=[row[0] for row in USAGE])
def test_usage(site: Site, vsub_run: Runner, line: str, text: str) -> None:
    site.script()
    outcome = vsub_run(*line.split())
    assert outcome.status == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith(f"vsub: VT-USAGE: {text}") and outcome.stderr.count("\n") == 1
    assert not site.called and site.left_in_home() == []


@pytest.mark.parametrize(
    ("directive", "text"),
    [
        ("#PBS -N 'open", "unmatched ' in job.sh line 2"),
        ("#PBS -y", "the option -y is not known (job.sh line 2)"),
        ("#PBS --wait", "the option --wait is not known (job.sh line 2)"),
        ("#PBS -vm", "-vm (job.sh line 2) has no value"),
        ("#PBS -l a=1\\", "job.sh line 2: a directive goes on (\\) where the file ends; take the backslash out"),
    ],
)
def test_bad_directives(site: Site, vsub_run: Runner, directive: str, text: str) -> None:
    site.script(f"#!/bin/sh\n{directive}\n")
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and f"VT-USAGE: {text}" in outcome.stderr
    assert not site.called and site.left_in_home() == []


def test_no_default_image_is_never_bare_metal(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.configure(default=None)
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and outcome.stderr.startswith("vsub: VT-IMAGE: no image is asked for")
    assert not site.called and site.left_in_home() == []


def test_share_that_the_image_cannot_mount(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.configure(
        "policy: {img: {default: micro}}\n"
        "mounts:\n- {name: home, source: '{home}', target: '{home}'}\n"
        "- {name: fast, kind: virtiofs, source: /fast, target: /fast}\n"
    )
    place = f"{site.install.config} line 4"
    assert vsub_run("-vm", "mounts=home+fast", "job.sh") == (
        2,
        "",
        f"vsub: VT-IMAGE: the image micro cannot mount the share fast ({COMMAND}), which is of kind virtiofs "
        f"({place}); choose another image, or leave fast out of mounts=\n",
    )
    assert not site.called and site.left_in_home() == []


@pytest.mark.parametrize("key", ["vm_prologue", "vm_epilogue"])
def test_user_hooks_not_allowed(site: Site, vsub_run: Runner, key: str) -> None:
    site.script()
    site.configure(f"policy: {{img: {{default: micro}}, {key}: {{enabled: false}}}}\n")
    outcome = vsub_run("-vm", f"{key}=job.sh", "job.sh")
    assert outcome == (
        2,
        "",
        f"vsub: VT-POLICY: {key}=job.sh ({COMMAND}) is refused; {key} is switched off here "
        f"(policy.{key}.enabled, {site.install.config} line 3)\n",
    )
    assert not site.called and site.left_in_home() == []


NODES = [
    ("-l nodes=2 job.sh", "-l nodes=2", 2),
    ("-l nodes=2:ppn=4 job.sh", "-l nodes=2:ppn=4", 2),
    ("-l nodes=1+1 job.sh", "-l nodes=1+1", 2),
    ("-l nodes=a:ppn=2+b job.sh", "-l nodes=a:ppn=2+b", 2),
    ("-l walltime=60,nodes=4 job.sh", "-l walltime=60,nodes=4", 4),
    ("-l nodes=1 -l nodes=3 job.sh", "-l nodes=3", 3),
]


@pytest.mark.parametrize(("line", "option", "count"), NODES, ids=[row[0] for row in NODES])
def test_more_nodes_than_the_policy_has(site: Site, vsub_run: Runner, line: str, option: str, count: int) -> None:
    site.script()
    site.configure("policy: {img: {default: micro}, nodes: {max: 1}}\n")
    place = f"{site.install.config} line 3"
    message = f"{option} ({COMMAND}) asks for {count} nodes with guests; 1 to 1 is allowed ({place})"
    assert vsub_run(*line.split()) == (2, "", f"vsub: VT-POLICY: {message}\n")
    assert not site.called and site.left_in_home() == []


FORMS = [
    ("-l procs=2 -l nodes=1 job.sh", "-l nodes=1 and -l procs=2"),
    ("-l ncpus=2 -l procs=2 job.sh", "-l procs=2 and -l ncpus=2"),
    ("-l ncpus=2 -L tasks=1 job.sh", "-l ncpus=2 and -L tasks=1"),
    ("-L tasks=1:lprocs=1 -L tasks=1 job.sh", "-L tasks=1:lprocs=1 and -L tasks=1"),
]


@pytest.mark.parametrize(("line", "options"), FORMS, ids=[row[0] for row in FORMS])
def test_nodes_in_two_forms(site: Site, vsub_run: Runner, line: str, options: str) -> None:
    site.script()
    message = f"vsub: VT-OPTION: {options} cannot both be honoured in a guest job; say nodes=N:ppn=M\n"
    assert vsub_run(*line.split()) == (2, "", message)
    assert not site.called and site.left_in_home() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", "cannot read the job script 'missing': No such file or directory"),
        (".", "the job script '.' is not a file"),
        ("fifo", "the job script 'fifo' is not a file"),
        ("elf", "the job script 'elf' is a program, not a script"),
        ("binary", "the job script 'binary' is binary, not a script"),
        ("huge", "the job script 'huge' is larger than 64 MiB"),
        ("/dev/zero", "the job script '/dev/zero' is not a file"),
        ("no\ttab", "cannot read the job script 'no\\ttab': No such file or directory"),
    ],
)
def test_scripts(site: Site, vsub_run: Runner, name: str, text: str) -> None:
    os.mkfifo(site.work / "fifo")
    (site.work / "elf").write_bytes(b"\x7fELF\0\0\0")
    (site.work / "binary").write_bytes(b"echo\0")
    with (site.work / "huge").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    outcome = vsub_run(name)
    assert outcome.status == 2 and outcome.stderr.startswith(f"vsub: VT-SCRIPT: {text}")
    assert outcome.stderr.count("\n") == 1
    assert not site.called and site.left_in_home() == []


def test_dos_line_ends_are_turned_and_told(site: Site, vsub_run: Runner) -> None:
    (site.work / "dos").write_bytes(b"#!/bin/sh\r\n#PBS -q a\r\necho \r x\r\n")
    assert vsub_run("dos") == (
        0,
        "12.host\n",
        "vsub: note: the job script 'dos' has DOS line ends; the job gets it with Unix line ends\n",
    )
    assert (site.directory / "script").read_bytes() == b"#!/bin/sh\n#PBS -q a\necho \r x\n"
    assert site.argv[site.argv.index("-q") + 1] == "a"


def test_unreadable_user_hook(site: Site, vsub_run: Runner) -> None:
    site.script()
    outcome = vsub_run("-vm", "vm_epilogue=absent", "job.sh")
    assert outcome.status == 2 and "cannot read the vm_epilogue 'absent'" in outcome.stderr
    assert site.left_in_home() == []


def test_directory_that_no_guest_sees(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    script = site.script()
    outside = site.base / "outside"
    outside.mkdir()
    monkeypatch.chdir(outside)
    monkeypatch.setenv("PWD", str(outside))
    outcome = vsub_run(str(script))
    assert outcome == (
        2,
        "",
        f"vsub: VT-WORKDIR: the job's directory '{outside}' (where you are) is not visible in the guest; "
        f"visible: {site.home}; submit from there, or give -d\n",
    )
    (site.home / "scratch").symlink_to(outside)
    for words in (["-d", str(site.home / "scratch")], ["-w", f"{site.home}/.."]):
        outcome = vsub_run(*words, str(script))
        assert outcome.status == 2 and "VT-WORKDIR" in outcome.stderr and "(the command line)" in outcome.stderr
    assert not site.called and site.left_in_home() == []


def test_shell_must_be_a_path(site: Site, vsub_run: Runner) -> None:
    site.script()
    assert "VT-VALUE: -S bash (the command line) names no absolute path" in vsub_run("-S", "bash", "job.sh").stderr


def test_home_that_cannot_be_used(site: Site, vsub_run: Runner) -> None:
    site.script()
    (site.home / ".vtorque").symlink_to(site.base)
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and f"VT-HOME: {site.home}/.vtorque is not a folder of yours" in outcome.stderr
    assert not site.called and not (site.base / "key").exists()


@pytest.fixture
def home_called(
    tmp_path: Path, site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, Outcome]]:
    """Submits from a home of that name."""
    import vsub.cli
    from vsub.account import Account

    def submit(name: str) -> tuple[Path, Outcome]:
        home = tmp_path / name
        (home / "work").mkdir(parents=True)
        monkeypatch.setattr(vsub.cli, "account", lambda: Account("carol", os.geteuid(), str(home)))
        monkeypatch.chdir(home / "work")
        monkeypatch.setenv("PWD", str(home / "work"))
        Path("job.sh").write_text("true\n")
        return home, vsub_run("job.sh")

    return submit


@pytest.mark.parametrize("character", [*",%$\"'`\\=*?[]{}()<>|&;!#^ ü", "\n", "\t"])
def test_home_that_somebody_would_misread(
    site: Site, home_called: Callable[[str], tuple[Path, Outcome]], character: str
) -> None:
    home, outcome = home_called(f"a{character}h")
    assert outcome.status == 2 and outcome.stderr.startswith("vsub: VT-HOME: the home")
    assert outcome.stderr.count("\n") == 1
    assert not site.called and list(home.rglob(".vtorque")) == []


def test_home_with_every_legal_character(site: Site, home_called: Callable[[str], tuple[Path, Outcome]]) -> None:
    home, outcome = home_called("aZ09._-+@:~")
    assert outcome == (0, "12.host\n", "")
    assert len(list(home.glob(".vtorque/*/*/spec.json"))) == 1


def test_no_room_for_the_key(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script()
    monkeypatch.setattr("vsub.jobdir.KEYGEN", "/bin/false")
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and "VT-HOME: /bin/false failed with status 1" in outcome.stderr
    assert not site.called and site.left_in_home() == []


def test_qsub_that_is_not_there(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.qsub.unlink()
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and f"VT-ENGINE: cannot use the batch system's {site.qsub}" in outcome.stderr
    assert site.left_in_home() == []


def test_qsub_that_is_vsub(site: Site, vsub_run: Runner) -> None:
    site.script()
    launcher = site.install.root / "bin" / "vsub"
    launcher.parent.mkdir()
    launcher.symlink_to(site.qsub)
    for words in ([], ["-vm", "off"]):
        outcome = vsub_run(*words, "job.sh")
        assert outcome.status == 2 and f"VT-ENGINE: {site.qsub} is vsub itself" in outcome.stderr
    assert not site.called


def test_wrong_configuration_names_file_line_and_key(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.configure("policy:\n  vcpus: {max: many}\n")
    outcome = vsub_run("-vm", "off", "job.sh")
    assert outcome.status == 2 and f"VT-CONFIG: {site.install.config} line 4: policy.vcpus.max" in outcome.stderr


def test_fault_is_one_line_unless_debug(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom\nsecond line")

    monkeypatch.setattr("vsub.cli.load_config", broken)
    outcome = vsub_run("job.sh")
    assert outcome.status == 70
    assert (
        outcome.stderr
        == "vsub: VT-INTERNAL: RuntimeError: boom\\nsecond line; run it again with --debug and report it\n"
    )
    assert "Traceback" in vsub_run("--debug", "job.sh").stderr


@pytest.mark.parametrize(("folder", "seen"), [("{base}/w/{{job}}", False), ("{base}/w", True)])
def test_a_workspace_is_seen_where_its_folder_is_known(
    site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch, folder: str, seen: bool
) -> None:
    """Before a job is submitted it has no id: nothing can be there, not even under that very name."""
    share = "mounts: [{name: w, source: '{workspace}', target: '{workspace}'}]\n"
    where = folder.format(base=site.base)
    site.configure(f"{share}workspace: {{folder: '{where}'}}\npolicy: {{img: {{default: micro}}}}\n")
    here = Path(where)
    here.mkdir(parents=True)
    script = site.script()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PWD", str(here))
    outcome = vsub_run(str(script))
    if seen:
        assert outcome.status == 0
    else:
        assert outcome.status == 2 and "visible: nothing" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "taken"), [(r"LAB\carol", True), ("carol@lab.example.org", True), ("ca rol", False), ("carol:x", False)]
)
def test_a_user_that_guests_cannot_have_is_told_what_is_allowed(
    name: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = pwd.struct_passwd((name, "x", os.geteuid(), os.getegid(), "", "/home/carol", "/bin/sh"))
    monkeypatch.setattr("vsub.account.pwd.getpwuid", lambda _uid: entry)
    if taken:
        assert account().name == name
        return
    with pytest.raises(VTorqueError, match="cannot have guests") as raised:
        account()
    assert raised.value.code is Code.ACCESS and "letters, digits, _ . @ + - and \\ (64" in str(raised.value.hint)


def test_a_queue_that_no_node_would_take(site: Site, vsub_run: Runner) -> None:
    site.script()
    done = vsub_run("-q", "a/b", "job.sh")
    assert done.stderr == (
        f"vsub: VT-OPTION: -q a/b ({COMMAND}) names no queue that guest jobs can be in; allowed are letters, digits, "
        "_ . @ + - and : (64 at most, the first a letter, a digit or _)\n"
    )
    assert not site.called and vsub_run("-q", "a+b:c@head", "job.sh").status == 0
