"""Guest jobs: what vsub writes into the home and what qsub is given."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from vsubsite import Runner, Site

from vmgr.jobspec import GuestGroup

HEAD = ["-C", "", "-l", "prologue=DIR/prologue", "-S", "PREFIX/libexec/vtorque-job"]
ACCESS = ["-l", "naccesspolicy=uniqueuser"]
TAIL = ["-l", "mem=768mb", *ACCESS]
"""What a guest of 512 MiB needs of its node, and who may share it."""


def test_plain_job_is_a_guest_job(site: Site, vsub_run: Runner) -> None:
    script = site.script("#!/bin/bash\necho hello\n")
    assert vsub_run("job.sh") == (0, "12.host\n", "")
    assert site.argv == [*HEAD, "-N", "job.sh", *TAIL, "DIR/job"]
    spec = site.spec
    assert spec.groups == (GuestGroup(image="micro", per_node=1, vcpus=1, ram_mib=512),)
    assert (spec.asked, spec.distro, spec.shell, spec.keep) == ((), None, None, False)
    assert (spec.mounts, spec.network, spec.workdir) == (("home", "opt-hpc"), "user", str(site.work))
    assert (site.directory / "script").read_bytes() == script.read_bytes()
    assert spec.ruid == site.directory.parent.name


def test_an_image_in_a_revision(site: Site, vsub_run: Runner) -> None:
    site.script()
    assert vsub_run("-vm", "img=debian-12@1", "job.sh").status == 0
    assert site.spec.groups[0].image == "debian-12@1"


@pytest.mark.parametrize(
    ("name", "path"), [("./disk.qcow2", "{}/disk.qcow2"), ("../disk.qcow2", "{}/../disk.qcow2"), ("/a/disk", "/a/disk")]
)
def test_an_image_of_the_users_own(name: str, path: str, site: Site, vsub_run: Runner) -> None:
    """By its whole path; like the site's default, or what distro= says."""
    site.script()
    text = site.install.config.read_text().split("policy:")[0]
    site.install.config.write_text(
        text.replace("images: {pool:", "images: {allow_user_images: true, pool:")
        + "policy: {img: {default: micro}, fs_type: {allowed: [overlay, ramdisk]}, ram: {default: 256M}}\n"
    )
    done = vsub_run("-vm", f"img={name}", "job.sh")
    taken = f"note: img={path.format(site.work)} is taken to be of the family micro, as the default image is"
    assert done.status == 0 and f"{taken}; distro=FAMILY says otherwise: debian" in done.stderr
    spec = site.spec
    assert spec.groups == (GuestGroup(path.format(site.work), 1, 1, 256),)
    assert vsub_run("-vm", f"img={name},fs_type=ramdisk", "job.sh").stderr.startswith(
        "vsub: VT-POLICY: fs_type=ramdisk"
    )
    assert "is the family of no image here; distro=FAMILY says it: debian, micro" in vsub_run(
        "-vm", f"img={name},distro=suse", "job.sh"
    ).stderr  # fmt: skip


def test_an_own_image_of_another_family(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.install.config.write_text(
        site.install.config.read_text().replace("images: {pool:", "images: {allow_user_images: true, pool:")
    )
    assert vsub_run("-vm", "img=/some/disk,distro=debian,ram=256M", "job.sh").stderr.startswith(
        "vsub: VT-POLICY: ram=256M"
    )
    assert "holds control characters" in vsub_run("-vm", "img=/a\nb", "job.sh").stderr
    done = vsub_run("-vm", "img=/some/disk,distro=debian", "job.sh")
    assert done.status == 0 and "is taken to be" not in done.stderr
    assert (site.spec.groups[0].image, site.spec.distro) == ("/some/disk", "debian")


def test_job_directory(site: Site, vsub_run: Runner) -> None:
    site.script()
    (site.work / "before").write_text("echo before\n")
    assert vsub_run("-vm", "vm_prologue=before", "job.sh").status == 0
    folder = site.directory
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "job": 0o700,
        "key": 0o600,
        "key.pub": 0o600,
        "prologue": 0o700,
        "script": 0o700,
        "spec.json": 0o600,
        "vm_prologue": 0o700,
    }
    for outer in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(outer.stat().st_mode) == 0o700
    libexec = site.install.libexec
    assert (folder / "prologue").read_text() == f'#!/bin/sh\nexec {libexec}/vtorque-user-prologue "$@"\n'
    assert (folder / "job").read_text() == f'#!/bin/sh\nexec {libexec}/vtorque-job {folder} "$@"\n'
    assert (folder / "key").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert (folder / "key.pub").read_text().startswith(site.spec.ssh_public_key)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "job_id"}


ROWS = [
    ("-N name job.sh", ["-N", "name"]),
    ("-Nname job.sh", ["-N", "name"]),
    ("job.sh -N name", ["-N", "name"]),
    ("job.sh -hVN name", ["-h", "-V", "-N", "name"]),
    ("-v m job.sh", ["-N", "job.sh", "-v", "m"]),
    ("-v -vm job.sh", ["-N", "job.sh", "-v", "-vm"]),
    ("-W group_list=users job.sh", ["-N", "job.sh", "-W", "group_list=users"]),
    ("sub/../job.sh", ["-N", "job.sh"]),
    ("-vm vcpus=1 -q a job.sh -vm distro=SLG", ["-N", "job.sh", "-q", "a"]),
]
"""A few, for the whole way; test_vsub_table.py has them all."""


@pytest.mark.parametrize(("line", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_options_reach_qsub(site: Site, vsub_run: Runner, line: str, expected: list[str]) -> None:
    site.script()
    (site.work / "sub").mkdir()
    assert vsub_run(*line.split()) == (0, "12.host\n", "")
    assert site.argv == [*HEAD, *expected, *TAIL, "DIR/job"]


def test_values_are_not_split_again(site: Site, vsub_run: Runner) -> None:
    site.script()
    values = ["A=a b\nc", "", "ünï", "'\"$x`"]
    words = [word for value in values for word in ("-v", value)]
    assert vsub_run(*words, "job.sh").status == 0
    assert site.argv == [*HEAD, "-N", "job.sh", *words, *TAIL, "DIR/job"]


def test_directives_become_options_before_the_users(site: Site, vsub_run: Runner) -> None:
    site.script(
        "#!/bin/sh\n"
        "#PBS -N from_script -l walltime=60\n"
        "\n"
        "# a comment\n"
        "  #PBS -v 'A=1 2',B\\ C\n"
        "#PBS -l \\\n"
        "nodes=1:ppn=2\n"
        "#PBS some words that are no options\n"
        "#PBS -vm vcpus=2,ram=1.5G\n"
        ":\n"
        "#PBS -q late\n"
        "true\n"
        "#PBS -q never -vm nonsense\n"
    )
    assert vsub_run("-l", "walltime=30", "job.sh") == (0, "12.host\n", "")
    expected = ["-N", "from_script", "-l", "walltime=60", "-v", "A=1 2,B C", "-l", "nodes=1:ppn=2", "-q", "late"]
    assert site.argv == [*HEAD, *expected, "-l", "walltime=30", "-l", "mem=1792mb", *ACCESS, "DIR/job"]
    assert site.spec.groups[0].vcpus == 2 and site.spec.groups[0].ram_mib == 1536
    assert site.spec.asked == ("ram", "vcpus")


@pytest.mark.parametrize(
    ("words", "env", "queue"),
    [
        (["-C", "#Q"], {}, "q1"),
        ([], {"PBS_DPREFIX": "#Q"}, "q1"),
        (["-C", "#PBS"], {"PBS_DPREFIX": "#Q"}, "q2"),
        ([], {}, "q2"),
        (["-C", ""], {}, None),
    ],
)
def test_directive_prefix(
    site: Site,
    vsub_run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    env: dict[str, str],
    queue: str | None,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    site.script("#Q -q q1\n#PBS -q q2\n")
    assert vsub_run(*words, "job.sh").status == 0
    assert site.argv == [*HEAD, "-N", "job.sh", *(["-q", queue] if queue else []), *TAIL, "DIR/job"]


def test_command_line_wins_over_directives(site: Site, vsub_run: Runner) -> None:
    site.script("#PBS -vm vcpus=4,img=debian-12\n#PBS -S /bin/csh\n#PBS -l nodes=4\ntrue\n")
    assert vsub_run("-vm", "vcpus=2", "-S", "/bin/bash@here,/bin/ksh", "-l", "nodes=1", "job.sh").status == 0
    assert site.spec.groups[0].vcpus == 2
    assert site.spec.groups[0].image == "debian-12"
    assert site.spec.shell == "/bin/ksh"


def test_script_on_standard_input(site: Site) -> None:
    done = site.launch("-q", "a", stdin=b"#PBS -l walltime=9\r\necho $1 \xff\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"12.host\n", b"")
    assert site.argv == [*HEAD, "-N", "STDIN", "-l", "walltime=9", "-q", "a", *TAIL, "DIR/job"]
    assert (site.directory / "script").read_bytes() == b"#PBS -l walltime=9\necho $1 \xff\n"


def test_working_directory(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script()
    (site.home / "link").symlink_to(site.work)
    monkeypatch.setenv("PWD", str(site.home / "link"))
    assert vsub_run("job.sh").status == 0
    assert site.spec.workdir == str(site.home / "link")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-d", "sub"], "work/sub"),
        (["-w", "{home}/other"], "other"),
        (["-w", "{home}/other", "-d", "{home}/third"], "third"),
    ],
)
def test_working_directory_options(site: Site, vsub_run: Runner, words: list[str], expected: str) -> None:
    site.script()
    words = [word.replace("{home}", str(site.home)) for word in words]
    assert vsub_run(*words, "job.sh").status == 0
    assert site.spec.workdir == str(site.home / expected)
    assert site.argv == [*HEAD, "-N", "job.sh", *words, *TAIL, "DIR/job"]


def test_home_that_is_a_link(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = site.base / "moved"
    site.home.rename(moved)
    site.home.symlink_to(moved)
    monkeypatch.chdir(site.work)
    site.script()
    assert vsub_run("job.sh").status == 0
    assert site.spec.workdir == str(site.work)


def test_false_pwd_is_not_believed(site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script()
    monkeypatch.setenv("PWD", "/usr")
    assert vsub_run("job.sh").status == 0
    assert site.spec.workdir == str(site.work)


def test_qsub_failure_is_passed_on_and_leaves_nothing(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.answer(stderr="qsub: Bad UID for job execution MSG=root\n", status=167)
    assert vsub_run("job.sh") == (167, "", "qsub: Bad UID for job execution MSG=root\n")
    assert site.called and site.left_in_home() == []


def test_qsub_killed(site: Site, vsub_run: Runner) -> None:
    site.script()
    site.answer(signal="KILL")
    assert vsub_run("job.sh").status == 137
    assert site.left_in_home() == []


def test_umask_of_the_user_reaches_qsub(site: Site, vsub_run: Runner) -> None:
    site.script()
    before = os.umask(0o027)
    try:
        assert vsub_run("job.sh").status == 0
    finally:
        os.umask(before)
    assert (site.record / "umask").read_text() == "0027\n"


def test_debug_tells_what_is_done(site: Site, vsub_run: Runner) -> None:
    site.script()
    status, out, err = vsub_run("--debug", "job.sh")
    assert (status, out) == (0, "12.host\n")
    assert str(site.install.config) in err and str(site.directory) in err and str(site.qsub) in err


def test_large_script(site: Site, vsub_run: Runner) -> None:
    site.script("#PBS -q a\ntrue\n" + "echo 12345678\n" * 700_000)
    assert vsub_run("job.sh").status == 0
    assert (site.directory / "script").stat().st_size > 9_000_000


def test_compiled_configuration_is_used_and_dropped_when_stale(site: Site, vsub_run: Runner) -> None:
    from vmgr.config import compile_config

    site.script()
    compile_config(site.install)
    assert Path(f"{site.install.config}.compiled").exists()
    assert vsub_run("job.sh").status == 0
    assert site.spec.groups[0].image == "micro"
    site.configure(default=None)
    outcome = vsub_run("job.sh")
    assert outcome.status == 2 and "VT-IMAGE" in outcome.stderr
