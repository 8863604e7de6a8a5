"""What the guest's shell is given: exactly the job's environment, umask, limits and directory; read by real shells."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, in_session

from vmgr.errors import Code, VTorqueError
from vmgr.node.session import SSH_FAILED, GuestSession, run_file

SHELLS = [shell for shell in (["dash"], ["bash", "--posix"]) if shutil.which(shell[0])]
SHELLS_OWN_VARIABLES = {"PWD", "OLDPWD", "SHLVL", "_", "PBS_NODEFILE", "SHELL"}


def spec(workdir: Path, shell: str = "/bin/sh") -> dict[str, str]:
    return {"workdir": str(workdir), "shell": shell}


def write(path: Path, text: str) -> Path:
    path.write_text(text, errors="surrogateescape", encoding="utf-8")
    return path


def read_by(shell: list[str], file: Path, command: str = "exec /usr/bin/env -0") -> bytes:
    return subprocess.run(
        [*shell, "-c", f". {shlex.quote(str(file))}; {command}"], env={}, cwd="/", check=True, capture_output=True
    ).stdout


def environment(shell: list[str], file: Path) -> dict[str, str]:
    words = (os.fsdecode(word) for word in read_by(shell, file).split(b"\0")[:-1])
    return dict(word.split("=", 1) for word in words if word.split("=", 1)[0] not in SHELLS_OWN_VARIABLES)


GIVEN = {
    "PBS_JOBID": "12.host",
    "EMPTY": "",
    "LINES": "one\ntwo\n",
    "QUOTES": """it's "so" `id` $(id) $HOME \\n""",
    "UNICODE": "ünï 日本 😀",
    "LATIN1": "caf\udce9",
    "GLOB": "* ? [a] ~ {a,b} !x",
    "IFS": " \t\n",
    "PATH": "/opt/x/bin:/usr/bin:/bin",
    "_UNDER": "1",
    "a": "lower",
    "VT_JOB_SHELL_X": "x",
    "TABS": "\ta\t",
    "CONTROL": "\x01\x1b[2J\x7f\r",
    "LONG": "x" * 100_000,
}
NOT_GIVEN = {
    "HOSTNAME": "n1", "PWD": "/x", "OLDPWD": "/y", "SHLVL": "3", "_": "/bin/x", "TMPDIR": "/tmp/12.host",
    "SSH_AUTH_SOCK": "/tmp/agent", "DISPLAY": ":0", "XAUTHORITY": "/x", "SSH_CLIENT": "1", "SSH_CONNECTION": "1",
    "BASH_FUNC_module%%": "() { id; }", "BASH_FUNC_x": "() { id; }", "a-b": "1", "a.b": "1", "1a": "1", "": "1",
    "a b": "1", "x;id": "1", "x\ny": "1", "ünï": "1", "PBS_NODEFILE": "/node/file",
}  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
def test_the_environment_arrives_exactly(shell: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "run", run_file(spec(tmp_path), {**NOT_GIVEN, **GIVEN}))
    assert environment(shell, file) == GIVEN
    assert b"PBS_NODEFILE=/run/vtorque/nodefile\0" in read_by(shell, file)


@pytest.mark.parametrize("shell", SHELLS)
def test_variables_that_a_shell_keeps_for_itself_end_nothing(shell: list[str], tmp_path: Path) -> None:
    odd = {
        "UID": "4711", "EUID": "4711", "PPID": "1", "SHELLOPTS": "braceexpand:hashall", "BASHOPTS": "cmdhist",
        "BASH_VERSINFO": "5", "OPTIND": "x", "LINENO": "x",
    }  # fmt: skip
    file = write(tmp_path / "run", run_file(spec(tmp_path), {**odd, "AFTER": "1"}))
    assert environment(shell, file)["AFTER"] == "1"
    assert read_by(shell, file, "pwd").strip() == os.fsencode(tmp_path)


_VALUES = st.binary(max_size=60).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))


@FUZZ
@given(environ=st.dictionaries(st.from_regex(r"V_[A-Za-z0-9_]{0,8}", fullmatch=True), _VALUES, max_size=6))
def test_any_bytes_arrive_exactly(tmp_path: Path, environ: dict[str, str]) -> None:
    file = write(tmp_path / "run", run_file(spec(tmp_path), environ))
    for shell in SHELLS:
        assert environment(shell, file) == environ


@FUZZ
@given(st.dictionaries(st.text(max_size=12), st.text(max_size=12)))
def test_a_name_that_is_none_is_left_out(environ: dict[str, str]) -> None:
    text = run_file(spec(Path("/")), environ)
    for line in text.splitlines():
        if line.startswith("export ") and line.partition("=")[1]:
            name = line[7:].partition("=")[0]
            assert name.isidentifier() and name.isascii()


@pytest.mark.parametrize("shell", SHELLS)
def test_directory_shell_and_order(shell: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "it's a $(place)\n"
    folder.mkdir()
    text = run_file(spec(folder, "/bin/my sh"), {"CDPATH": "/", "A": "1"})
    file = write(tmp_path / "run", text)
    said = read_by(shell, file, 'printf \'%s\\0\' "$(pwd; echo .)" "$VT_JOB_SHELL"')
    assert said == os.fsencode(folder) + b"\n.\0/bin/my sh\0"
    kinds = [line.split()[0].partition("=")[0] for line in text.splitlines()]
    assert kinds.index("umask") < kinds.index("ulimit") < kinds.index("cd") < kinds.index("VT_JOB_SHELL")
    assert b"VT_JOB_SHELL=" not in read_by(shell, file), "not a variable of the job's"


def test_a_directory_that_is_not_there_ends_the_job(tmp_path: Path) -> None:
    file = write(tmp_path / "run", run_file(spec(tmp_path / "absent"), {}))
    for shell in SHELLS:
        done = subprocess.run([*shell, "-c", f". {shlex.quote(str(file))}; echo on"], capture_output=True)
        assert (done.returncode, done.stdout) == (1, b"") and b"absent" in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("mask", [0o022, 0o077, 0, 0o777])
def test_umask(shell: list[str], mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        text = run_file(spec(tmp_path), {})
        assert os.umask(mask) == mask, "it stays what it was"
    finally:
        os.umask(old)
    assert int(read_by(shell, write(tmp_path / "run", text), "umask"), 8) == mask


@pytest.mark.parametrize("shell", SHELLS)
def test_limits_arrive(shell: list[str], tmp_path: Path) -> None:
    code = """\
import resource
from pathlib import Path
from vmgr.errors import Code, VTorqueError
from vmgr.node.session import SSH_FAILED, GuestSession, run_file
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
resource.setrlimit(resource.RLIMIT_CORE, (0, 512 * 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 31))
resource.setrlimit(resource.RLIMIT_CPU, (100, 200))
resource.setrlimit(resource.RLIMIT_STACK, (1 << 22, 1 << 23))
print(run_file({"workdir": "/", "shell": "/bin/sh"}, {}), end="")
"""
    file = write(tmp_path / "run", in_session(code))
    names = ", ".join(f"r.RLIMIT_{name}" for name in ("NOFILE", "CORE", "FSIZE", "CPU", "STACK"))
    ask = f"import resource as r; print(*map(r.getrlimit, ({names})))"
    said = read_by(shell, file, f"exec {shlex.quote(sys.executable)} -IS -c {shlex.quote(ask)}").decode()
    assert said == f"(200, 300) (0, 512000) ({1 << 30}, {1 << 31}) (100, 200) ({1 << 22}, {1 << 23})\n"


def test_a_limit_above_the_guests_stays_at_the_guests(tmp_path: Path) -> None:
    file = write(tmp_path / "run", run_file(spec(tmp_path), {"A": "1"}))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 100
    command = "import os, resource, sys, warnings; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))\n"
    command += "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
    command += "os.execvp(sys.argv[1], sys.argv[1:])"
    file.chmod(0o644)
    for shell in SHELLS:
        # through standard input: another user cannot walk to pytest's folder
        done = subprocess.run(
            [sys.executable, "-IS", "-c", command, *shell, "-c", "eval \"$1\"; ulimit -Hn; echo $A", "sh",
             file.read_text().replace(str(tmp_path), "/")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == "60\n1\n", done.stderr


# what the runner is given beside that, and what is made of its end


@FUZZ
@given(
    arguments=st.text(st.characters(blacklist_characters="\0\n", blacklist_categories=("Cs",)), max_size=60) | _VALUES
)
def test_any_arguments_arrive_exactly_and_are_no_more_than_a_line(tmp_path: Path, arguments: str) -> None:
    arguments = arguments.replace("\n", " ")
    session = GuestSession(tmp_path, "n1.1-2-3", "vn1-1", 22, "ssh-ed25519 AAAA x")
    session._describe("A=1\n", tmp_path / "it's", arguments)
    for shell in SHELLS:
        said = read_by(shell, tmp_path / "run.n1.1-2-3", 'printf \'%s\\0\' "$A$VT_JOB_SCRIPT" "$VT_JOB_ARGUMENTS"')
        assert said == b"1" + os.fsencode(tmp_path / "it's") + b"\0" + os.fsencode(arguments) + b"\0"


@pytest.mark.parametrize(
    ("ssh", "file", "status"),
    [
        (0, None, 0), (7, "9\n", 7), (SSH_FAILED, "255\n", 255), (-9, "3\n", 3), (-15, "99999999999\n", 255),
        (SSH_FAILED, None, None), (-9, None, None), (SSH_FAILED, "", None), (SSH_FAILED, "x\n", None),
    ],
)  # fmt: skip
def test_the_runners_word_tells_a_job_from_a_broken_connection(
    ssh: int, file: Optional[str], status: Optional[int], tmp_path: Path
) -> None:
    session = GuestSession(tmp_path, "t", "vn1-1", 22, "ssh-ed25519 AAAA x")
    if file is not None:
        (tmp_path / "ended.t").write_text(file)
    if status is not None:
        assert session._ended(ssh) == status
        return
    (tmp_path / "ssh.t").write_text("noise\nConnection reset by peer\n")
    with pytest.raises(VTorqueError, match="vn1-1 failed or broke: Connection reset by peer") as caught:
        session._ended(ssh)
    assert caught.value.code is Code.CONNECT


def test_nothing_that_two_sessions_write_has_the_same_name(tmp_path: Path) -> None:
    for tag in ("n1.1.0-1-a", "n1.2.0-1-a", "n2.1.0-1-a"):
        GuestSession(tmp_path, tag, "vn1-1", 22, "ssh-ed25519 AAAA x")._describe("", tmp_path / "script", "")
    assert len(list(tmp_path.iterdir())) == 6
