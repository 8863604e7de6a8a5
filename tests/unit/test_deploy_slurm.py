"""Installing for Slurm: options, the first configuration, and what a site's slurm.conf says of the lines it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.deploy import options, slurmconf, slurmsite
from vmgr.deploy.front import engine_in, first_config, slurm_bin_in, slurm_text
from vmgr.deploy.slurmconf import DIFFERENT, MISSING, THERE, Settings, Value
from vmgr.deploy.slurmfiles import conf_lines
from vmgr.errors import Code, VTorqueError

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "/opt/x/share/vtorque/mom_priv_hooks/slurm"
TOLD = """\
Configuration data as of 2026-11-28T08:08:30
ClusterName             = ref
Epilog[0]               = /site/epilog
Epilog[1]               = /opt/x/share/vtorque/mom_priv_hooks/slurm/epilog
Prolog                  = (null)
PrologFlags             = Alloc,Contain,DeferBatch
TaskProlog              = /site/task
"""


# --- options and the first configuration


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hooks", "wrap"], "--hooks"),
        (["--prologalarm", "keep"], "--prologalarm"),
        (["--torque-home", "/var/spool/torque", "--hooks", "jobtype"], "--hooks, --torque-home"),
    ],
)
def test_what_is_about_moms_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(VTorqueError) as raised:
        options.read(["--engine", "slurm", *words])
    assert raised.value.message == f"{said}: the engine is slurm, which has no mom"
    assert raised.value.code is Code.USAGE
    assert options.read(["--engine", "torque", *words]).engine == "torque"


def test_the_engine_is_an_answer_too(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("engine: slurm\nnodes: n[1-3]\n")
    assert options.read(["--answers", str(file)]).engine == "slurm"
    file.write_text("engine: slurm\nhooks: wrap\n")
    with pytest.raises(VTorqueError, match="has no mom"):
        options.read(["--answers", str(file)])
    with pytest.raises(VTorqueError, match="torque or slurm is needed"):
        options.read(["--engine", "lsf"])


def test_the_first_configuration_says_slurm(tmp_path: Path) -> None:
    sample = REPOSITORY / "contrib" / "vtorque.yaml"
    made = first_config(str(sample), "/opt/x", None, "slurm")
    assert yaml.safe_load(made) == {**yaml.safe_load(first_config(str(sample), "/opt/x", None)), "engine": "slurm"}
    assert engine_in(made.decode()) == "slurm"
    bare = tmp_path / "bare.yaml"
    bare.write_text("submit: {without_vm: guest}")
    assert yaml.safe_load(first_config(str(bare), "/opt/x", None, "slurm"))["engine"] == "slurm"
    assert engine_in("a:\n  engine: local\n# engine: torque\n") is None and engine_in("engine: 'slurm'\n") == "slurm"


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("slurm: {bin: /opt/slurm/bin}\n", "/opt/slurm/bin"),
        ("slurm: {queues: [a], bin: '/opt/slurm/bin/'}  # ours\n", "/opt/slurm/bin"),
        ('engine: slurm\nslurm:   # ours\n  # where\n\n  x: {y: 1}\n  bin: "/s"  # here\n', "/s"),
        ("slurm:\n  bin: {n*: /s}\nother:\n  bin: /t\n", ""),
        ("slurm:\nother:\n  bin: /t\n", ""),
        ("# slurm: {bin: /s}\nnot_slurm: {bin: /t}\n", ""),
        ("slurm: {cabin: /t}\n", ""),
        ("slurm:\n  cabin: /t\n", ""),
    ],
)
def test_where_a_configuration_has_slurms_commands(text: str, folder: str) -> None:
    assert slurm_bin_in(text) == folder


# --- slurm.conf


def states(settings: Settings, calling: tuple[str, ...] = ()) -> list[tuple[str, str, bool]]:
    judged = slurmconf.judge(FOLDER, settings, lambda pattern, _: pattern in calling)
    assert [each.line for each in judged] == [*conf_lines(FOLDER)] and "\n" not in "".join(map(str, judged))
    return [(each.line.partition("=")[0], each.state, each.bad) for each in judged]


def test_the_lines_that_are_written_are_there_once_they_are_added() -> None:
    settings = slurmconf.parse_file("/etc/slurm/slurm.conf", lambda _: slurm_text("/opt/x"))
    assert [state for _, state, _ in states(settings)] == [THERE] * 4


def test_what_slurm_tells() -> None:
    assert states(slurmconf.told(TOLD)) == [
        ("Prolog", MISSING, True),
        ("Epilog", THERE, False),
        ("TaskProlog", DIFFERENT, False),
        ("PrologFlags", THERE, False),
    ]
    assert states({}) == [
        ("Prolog", MISSING, True), ("Epilog", MISSING, True), ("TaskProlog", MISSING, False),
        ("PrologFlags", MISSING, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "state", "bad"),
    [
        ("Alloc,DeferBatch", THERE, False),
        ("deferbatch, alloc,NoHold", THERE, False),
        ("Contain,DeferBatch", THERE, False),
        ("Alloc", DIFFERENT, False),
        ("X11", DIFFERENT, False),
        ("Serial", DIFFERENT, True),
        ("DeferBatch", DIFFERENT, True),
    ],
)
def test_flags(flags: str, state: str, bad: bool) -> None:
    assert states({"prologflags": [Value(flags)]})[3] == ("PrologFlags", state, bad)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (None, "PrologFlags=Contain,DeferBatch is missing"),
        (
            "Alloc,DeferBatch",
            "PrologFlags=Contain,DeferBatch is different: it is Alloc,DeferBatch, and guests are not in control groups",
        ),
        ("Contain,DeferBatch", "PrologFlags=Alloc,DeferBatch is there: it is Contain,DeferBatch"),
        ("Alloc,Contain,DeferBatch", "PrologFlags=Alloc,DeferBatch is there"),
    ],
)  # fmt: skip
def test_control_groups_need_a_flag_more(flags: Optional[str], said: str) -> None:
    settings = {"proctracktype": [Value("proctrack/cgroup")], **({"prologflags": [Value(flags)]} if flags else {})}
    assert str(slurmconf.judge(FOLDER, settings, lambda *_: True)[3]) == said


def test_a_site_that_calls_ours() -> None:
    settings = {"prolog": [Value("/etc/slurm/prolog.d/*")], "epilog": [Value("/site/epilog", "f line 3")]}
    found = states(settings, ("/etc/slurm/prolog.d/*",))
    assert found[:2] == [("Prolog", THERE, False), ("Epilog", DIFFERENT, True)]
    told = [str(each) for each in slurmconf.judge(FOLDER, settings, lambda pattern, _: "prolog.d" in pattern)]
    assert told[0] == f"Prolog={FOLDER}/prolog is there: by way of /etc/slurm/prolog.d/*"
    assert told[1] == f"Epilog={FOLDER}/epilog is different: it is /site/epilog (f line 3)"
    assert told[3] == "PrologFlags=Alloc,DeferBatch is missing"


def test_two_lines_of_a_kind() -> None:
    """All of them run on newer versions, only the last one on others."""
    ours, other = Value(f"{FOLDER}/prolog", "f line 1"), Value("/site/prolog", "f line 2")
    for values, why in (
        ((ours, other), "before Slurm 24.05 /site/prolog (f line 2) would run alone"),
        ((other, ours), ""),
    ):
        first = slurmconf.judge(FOLDER, {"prolog": values}, lambda pattern, _: False)[0]
        assert (first.state, first.bad, first.why) == (THERE, False, why)
    told = slurmconf.told(f"Prolog[0] = {FOLDER}/prolog\nProlog[1] = /site/prolog\n")
    assert slurmconf.judge(FOLDER, told, lambda pattern, _: False)[0].why == ""


def test_which_programs_call_ours(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\n")
    parts = tmp_path / "prolog.d"
    parts.mkdir()
    (parts / "10-site").write_text("#!/bin/sh\nexit 0\n")
    assert not slurmsite.calls(f"{parts}/*", str(hook)) and not slurmsite.calls("relative", str(hook))
    (parts / "20-vtorque").symlink_to(hook)
    assert slurmsite.calls(f"{parts}/*", str(hook))
    (parts / "20-vtorque").unlink()
    (parts / "10-site").write_text(f"#!/bin/sh\nexec {hook}\n")
    assert slurmsite.calls(f"{parts}/10-site", str(hook))


def reader(**files: str) -> slurmconf.Settings:
    def read(path: str) -> str:
        try:
            return files[Path(path).name]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory") from None

    return slurmconf.parse_file("/etc/slurm/main", read)


def test_a_file() -> None:
    more = "epilog = /b # theirs\nPROLOG=/c\n"
    text = '# x\nClusterName=a Prolog=/a\\\n  TaskProlog="/t p"\n\nInclude more\r\nNodeName=n[1-3] CPUs=4 X=a\\#b\n'
    found = reader(main=text, more=more)
    assert found["prolog"] == [Value("/a", "/etc/slurm/main line 2"), Value("/c", "/etc/slurm/more line 2")]
    assert reader(main="TaskProlog=/a\nTaskProlog=/b\n")["taskprolog"][0].text == "/b", "the last one holds"
    assert found["epilog"] == [Value("/b", "/etc/slurm/more line 1")]
    assert found["taskprolog"] == [Value("/t p", "/etc/slurm/main line 2")]
    assert found["x"][0].text == "a\\#b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Prolog=/a\nProlog /a\n", "/etc/slurm/main line 2 is no line of slurm.conf"),
        ("Prolog=", "line 1 is no line"),
        ('Prolog="/a', "line 1 is no line"),
        ('Prolog="/a"b', "line 1 is no line"),
        ("\n\nInclude none\n", "line 3: Include none cannot be read: No such file"),
        ("Include conf.d/*.conf", r"line 1: Include conf.d/\*.conf is not followed: it is a pattern"),
        ("Include main", "line 1: Include main is not followed: it is file number 65"),
    ],
)
def test_a_file_that_is_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reader(main=text)


@FUZZ
@given(st.text(alphabet='Prologincudem="\\#/* \t\r\n,a%[]', max_size=200))
def test_any_file_is_read_or_refused(text: str) -> None:
    try:
        found = reader(main=text)
    except ValueError as err:
        assert str(err).startswith("/etc/slurm/main line ")
        return
    for values in found.values():
        assert len(values) == 1 and "\n" not in values[0].text


@FUZZ
@given(st.text(max_size=300))
def test_any_answer_of_slurm_is_judged(text: str) -> None:
    assert len(states(slurmconf.told(text))) == 4


# --- programs of Slurm's


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("answers", [True, False])
def test_slurms_word_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nProlog=/file\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    program(tmp_path, "scontrol", f"cat <<'X'\n{TOLD}X" if answers else "echo 'no contact' >&2; exit 1")
    found = slurmsite.find(str(tmp_path))
    assert found.source == ("scontrol show config" if answers else str(conf)) and not found.problem
    assert bool(found.settings.get("prolog")) is not answers
    report = slurmsite.report("/opt/x", str(tmp_path))
    assert report.bad and len(report.lines) == 4 and bool(report.ours) is answers
    assert report.lines[0].startswith(f"slurm.conf ({found.source}): Prolog=")


@pytest.mark.parametrize("text", [None, "what is this\n"])
def test_nothing_tells_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Optional[str]) -> None:
    conf = tmp_path / "slurm.conf"
    if text is not None:
        conf.write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    program(tmp_path, "scontrol", "echo 'no contact' >&2; exit 1")
    report = slurmsite.report("/opt/x", str(tmp_path))
    said = (
        f"{conf} line 1 is no line" if text else f"scontrol show config: no contact, and {conf} cannot be read: No such"
    )
    assert report.bad and len(report.lines) == 1 and said in report.lines[0]


def test_all_nodes_are_those_of_sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sinfo", "printf 'n10\\nn2\\nn2\\n'")
    assert slurmsite.all_nodes(str(tmp_path)) == ["n2", "n10"]
    for text, said in (("exit 0", "has no nodes"), ("echo 'no contact' >&2; exit 1", "--all: sinfo .*: no contact")):
        program(tmp_path, "sinfo", text)
        with pytest.raises(VTorqueError, match=said) as raised:
            slurmsite.all_nodes(str(tmp_path))
        assert raised.value.code is Code.ENGINE and raised.value.hint == "name the nodes with --nodes SET"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VTorqueError, match="there is no sinfo"):
        slurmsite.all_nodes()


def test_what_slurm_tells_is_not_filtered_by_the_callers_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SINFO_PARTITION", "small")
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    monkeypatch.setenv("SLURM_CONF", "/site/slurm.conf")
    heard = "case $(env) in *SINFO_*|*CLUSTERS*) echo n1 ;; *SLURM_CONF=/site*) echo n1; echo n2 ;; esac"
    program(tmp_path, "sinfo", heard)
    assert slurmsite.all_nodes() == ["n1", "n2"]


def test_commands_of_this_host() -> None:
    assert slurmconf.commands_folder("/usr/bin/", "a.b") == "/usr/bin"
    assert slurmconf.commands_folder({"n*": "/n", "a": "/a"}, "a.b") == "/a"
    assert slurmconf.commands_folder({"n*": "/n"}, "a.b") == ""
