"""What is refused at submission: one line that names value, bound and place; nothing submitted, nothing left."""
# ruff: noqa: E501 (a row of a table is a line)

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from vsubsite import Outcome, Runner, Site

CONFIG = "{config}"
COMMAND = "the command line"

POLICY = [
    ("-vm vcpus=9 job.sh", f"vsub: VT-POLICY: vcpus=9 ({COMMAND}) is above the maximum 8; 1 to 8 is allowed ({CONFIG} line 3)"),
    ("-vm vcpus=0 job.sh", f"vsub: VT-POLICY: vcpus=0 ({COMMAND}) is below the minimum 1; 1 to 8 is allowed (the built-in default)"),
    ("-vm ram=64M job.sh", f"vsub: VT-POLICY: ram=64M ({COMMAND}) is below the minimum 128M; 128M to 4G is allowed (the built-in default)"),
    ("-vm ram=5G job.sh", f"vsub: VT-POLICY: ram=5G ({COMMAND}) is above the maximum 4G; 128M to 4G is allowed ({CONFIG} line 3)"),
    ("-vm vms_per_node=2 job.sh", f"vsub: VT-POLICY: vms_per_node=2 ({COMMAND}) is above the maximum 1; 1 to 1 is allowed (the built-in default)"),
    ("-vm cpus=2 job.sh", f"vsub: VT-KEY: unknown request in {COMMAND}: the key 'cpus'; allowed: off, img=VALUE, distro=VALUE, vcpus=VALUE, ram=VALUE, vms_per_node=VALUE, vm_prologue=VALUE, vm_epilogue=VALUE"),
    ("-vm vcpus job.sh", f"vsub: VT-KEY: unknown request in {COMMAND}: 'vcpus'; allowed: off, img=VALUE, distro=VALUE, vcpus=VALUE, ram=VALUE, vms_per_node=VALUE, vm_prologue=VALUE, vm_epilogue=VALUE"),
    ("-vm vcpus=two job.sh", f"vsub: VT-VALUE: vcpus=two in {COMMAND} cannot be read; a whole number is needed"),
    ("-vm ram=1.3M job.sh", f"vsub: VT-VALUE: ram=1.3M in {COMMAND} cannot be read; a size such as 2048M or 1.5G (a whole number of MiB) is needed"),
    ("-vm img= job.sh", f"vsub: VT-VALUE: img in {COMMAND} has no value; write img=VALUE"),
    ("-vm img=suse job.sh", f"vsub: VT-IMAGE: img=suse ({COMMAND}): unknown image 'suse' in the pool {{pool}}; images: debian-12, micro"),
    ("-vm img=../x job.sh", f"vsub: VT-IMAGE: img=../x ({COMMAND}): unknown image '../x' in the pool {{pool}}; images: debian-12, micro"),
    ("-vm distro=redhat job.sh", f"vsub: VT-IMAGE: distro=redhat ({COMMAND}) does not describe the image micro; it is micro (SLG); distro= asserts, img= selects"),
    ("-vm img=debian-12,ram=256M job.sh", f"vsub: VT-POLICY: ram=256M ({COMMAND}) is less than the image debian-12 needs; at least 384M (the image's description in {{pool}})"),
    ("-vm vcpus=2 -vm vcpus=3 job.sh", f"vsub: VT-KEY: vcpus is asked for twice: 2 ({COMMAND}) and 3 ({COMMAND}); give it once"),
    ("-vm off -vm vcpus=3 job.sh", f"vsub: VT-KEY: -vm off ({COMMAND}) and -vm vcpus=3 ({COMMAND}) exclude each other"),
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
    ("-I", "-I", "interactive jobs do not run in guests yet"),
    ("-I -x job.sh", "-I", "interactive jobs do not run in guests yet"),
    ("-W interactive=true job.sh", "-W interactive=true", "interactive jobs do not run in guests yet"),
    ("-X job.sh", "-X", "X11 is not forwarded from guests"),
    ("-t 1-4%2 job.sh", "-t 1-4%2", "job arrays do not run in guests yet"),
    ("-W depend=afterok:1,job_array_request=1-2 job.sh", "-W depend=afterok:1,job_array_request=1-2", "job arrays do not run in guests yet"),
    ("-T other job.sh", "-T other", "vTorque's own hooks must run"),
    ("-W jobtype=other job.sh", "-W jobtype=other", "vTorque's own hooks must run"),
    ("-F args job.sh", "-F args", "arguments do not reach a script in a guest yet"),
    ("-P dave job.sh", "-P dave", "a guest job is submitted by its own user"),
    ("-J 1 job.sh", "-J 1", "a guest job is submitted by its own user"),
    ("-D /root job.sh", "-D /root", "the root folder of a guest is its own"),
    ("-W init_work_dir=/tmp job.sh", "-W init_work_dir=/tmp", "write it as -w"),
    ("-u dave job.sh", "-u dave", "a guest job runs as the user who submits it, carol"),
    ("-c enabled job.sh", "-c enabled", "a guest is not checkpointed by the batch system"),
    ("-l nodes=2 job.sh", "-l nodes=2", "guests run on one node yet"),
    ("-l nodes=2:ppn=4 job.sh", "-l nodes=2:ppn=4", "guests run on one node yet"),
    ("-l nodes=1+1 job.sh", "-l nodes=1+1", "guests run on one node yet"),
    ("-l nodes=a:ppn=2+b job.sh", "-l nodes=a:ppn=2+b", "guests run on one node yet"),
    ("-l walltime=60,nodes=4 job.sh", "-l walltime=60,nodes=4", "guests run on one node yet"),
    ("-l nodes=1 -l nodes=3 job.sh", "-l nodes=3", "guests run on one node yet"),
    ("-l procs=8 job.sh", "-l procs=8", "guests run on one node yet"),
    ("-L tasks=2:lprocs=1 job.sh", "-L tasks=2:lprocs=1", "guests run on one node yet"),
    ("-l prologue=/a job.sh", "-l prologue=/a", "the job's prologue is taken by vTorque; -vm vm_prologue=FILE runs one in the guest"),
    ("-l mem=1gb,epilogue=/a job.sh", "-l mem=1gb,epilogue=/a", "the job's epilogue is taken by vTorque; -vm vm_epilogue=FILE runs one in the guest"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "option", "reason"), UNHONOURED, ids=[row[0] for row in UNHONOURED])
def test_unhonoured_options(site: Site, vsub_run: Runner, line: str, option: str, reason: str) -> None:
    site.script()
    outcome = vsub_run(*line.split())
    message = f"vsub: VT-OPTION: {option} ({COMMAND}) cannot be honoured in a guest: {reason}{HINT}\n"
    assert outcome == (2, "", message)
    assert not site.called and site.left_in_home() == []


def test_unhonoured_directive_names_its_line(site: Site, vsub_run: Runner) -> None:
    site.script("#!/bin/sh\n\n#PBS -t 1-3\ntrue\n")
    assert "-t 1-3 (job.sh line 3) cannot be honoured" in vsub_run("job.sh").stderr
    assert not site.called and site.left_in_home() == []


USAGE = [
    ("-g job.sh", f"the option -g is not known ({COMMAND})"),
    ("-Vg job.sh", f"the option -g is not known ({COMMAND})"),
    ("--nonsense job.sh", f"the option --nonsense is not known ({COMMAND})"),
    ("job.sh -N", f"the option -N has no value ({COMMAND})"),
    ("job.sh other.sh", "one script can be submitted, not also 'other.sh'"),
    ("job.sh -vm", f"-vm ({COMMAND}) has no value"),
    ("--explain job.sh", "--explain is not available yet"),
    ("--dry-run -vm off job.sh", "--dry-run is not available yet"),
    ("-gf job.sh", "-gf is not available yet"),
    ("--json job.sh", "--json is not available yet"),
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
    ],
)
def test_bad_directives(site: Site, vsub_run: Runner, directive: str, text: str) -> None:
    site.script(f"#!/bin/sh\n{directive}\ntrue\n")
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and f"VT-USAGE: {text}" in outcome.stderr
    assert not site.called and site.left_in_home() == []


def test_no_default_image_is_never_bare_metal(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.configure(default=None)
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and outcome.stderr.startswith("vsub: VT-IMAGE: no image is asked for")
    assert not site.called and site.left_in_home() == []


def test_user_hooks_not_allowed(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.configure("policy: {img: {default: micro}, user_vm_hooks: false}\n")
    outcome = vsub_run("-vm", "vm_prologue=job.sh", "job.sh")
    assert outcome.status == 2 and "policy.user_vm_hooks" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", "cannot read the job script 'missing': No such file or directory"),
        (".", "the job script '.' is not a file"),
        ("fifo", "the job script 'fifo' is not a file"),
        ("elf", "the job script 'elf' is a program, not a script"),
        ("binary", "the job script 'binary' is binary, not a script"),
        ("dos", "the job script 'dos' has DOS/Windows line ends"),
        ("huge", "the job script 'huge' is larger than 64 MiB"),
        ("/dev/zero", "the job script '/dev/zero' is not a file"),
        ("no\ttab", "cannot read the job script 'no\\ttab': No such file or directory"),
    ],
)
def test_scripts(site: Site, vsub_run: Runner, name: str, text: str) -> None:
    os.mkfifo(site.work / "fifo")
    (site.work / "elf").write_bytes(b"\x7fELF\0\0\0")
    (site.work / "binary").write_bytes(b"echo\0")
    (site.work / "dos").write_bytes(b"echo\r\n")
    with (site.work / "huge").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    outcome = vsub_run(name)
    assert outcome.status == 2 and outcome.stderr.startswith(f"vsub: VT-SCRIPT: {text}")
    assert outcome.stderr.count("\n") == 1
    assert not site.called and site.left_in_home() == []


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
