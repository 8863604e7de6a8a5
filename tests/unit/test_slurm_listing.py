"""What Slurm's commands print, read strictly. Outputs recorded from Slurm 22.05.8 and 25.11.7."""

from __future__ import annotations

import re
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurmsite import SlurmSite

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vsub.batch import main as batch_main
from vsub.engines import JobState, PlacedJob
from vsub.engines.slurm import Slurm
from vsub.engines.slurmlisting import (
    is_on_hold,
    parse_cluster,
    parse_members,
    parse_nodes,
    parse_placed,
    parse_state,
    parse_version,
    runs,
    slurm_id,
)

SQUEUE = """\
352                             CANCELLED                       15              None
345                             FAILED                          768             NonZeroExitCode
346                             FAILED                          9               JobLaunchFailure
349                             PENDING                         0               Dependency
350                             PENDING                         0               JobArrayTaskLimit
351                             PENDING                         0               BeginTime
348                             PENDING                         0               JobHeldUser
347                             RUNNING                         0               JobHeldUser
353                             RUNNING                         0               None
14                              COMPLETED                       0               None
22                              PENDING                         0               Resources
"""
LINES = {line.split()[0]: line + "\n" for line in SQUEUE.splitlines()}
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize(
    ("job", "phase", "status"),
    [
        ("352", "completed", 143), ("345", "completed", 3), ("346", "completed", 137), ("14", "completed", 0),
        ("349", "waiting", None), ("351", "waiting", None), ("350", "queued", None), ("22", "queued", None),
        ("348", "held", None), ("347", "running", None), ("353", "running", None),
    ],
)  # fmt: skip
def test_states(job: str, phase: str, status: int) -> None:
    assert parse_state(LINES[job]) == JobState(phase, status)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("", JobState("unknown")),
        ("nonsense\n", JobState("unknown")),
        ("12 ODD 0 None\n", JobState("unknown")),
        ("12 CANCELLED 0 None\n", JobState("completed", None)),
        ("12 TIMEOUT 0 TimeLimit\n", JobState("completed", None)),
        ("12 COMPLETING 0 None\n", JobState("exiting")),
        ("12 PENDING 0:0 JobHoldMaxRequeue\n", JobState("held")),
        ("12 EXPEDITING 0:0 None\n", JobState("queued")),
        ("12 CANCELLED 0:0 None\n", JobState("completed", None)),
        ("12 CANCELLED 0:15 None\n", JobState("completed", 143)),
        ("12 COMPLETED 0:0 None\n", JobState("completed", 0)),
        ("12 FAILED 3:0 NonZeroExitCode\n", JobState("completed", 3)),
        ("12 FAILED 3:x NonZeroExitCode\n", JobState("completed", None)),
        ("12 REQUEUE_HOLD 0 JobHeldUser\n", JobState("held")),
        ("12    PENDING   0   job requeued in held state   \n", JobState("held")),
        (LINES["14"] + LINES["353"], JobState("running")),
        (LINES["345"] + LINES["14"], JobState("completed", 3)),
    ],
)
def test_states_of_other_kinds(text: str, state: JobState) -> None:
    assert parse_state(text) == state


def test_jobs_that_have_nodes() -> None:
    text = "347|vtsub1|n[1-2]\n353|vtsub1|n1\n360|other|n[09-10,12],m1\n"
    assert parse_placed(text, "ref") == (
        PlacedJob("347.ref", "vtsub1", ("n1", "n2")),
        PlacedJob("353.ref", "vtsub1", ("n1",)),
        PlacedJob("360.ref", "other", ("n09", "n10", "n12", "m1")),
    )
    for strange in ("x|a|n1", "1|a b|n1", "1|a|", "1|a|n[1-", "1|a|n1|n2", "1|a", "1|-a|n1", "1|a|n[1-99999999]"):
        assert parse_placed(strange, "ref") == ()


@given(st.text(max_size=80))
def test_whatever_stands_there(text: str) -> None:
    assert parse_state(text).phase
    for job in parse_placed(text, "ref"):
        assert job.nodes and job.job_id.endswith(".ref")
    parse_nodes(text)


FIELD = st.text(st.sampled_from("019\u00b2\u0663:_[]-%~"), min_size=1, max_size=12)


@given(st.lists(st.tuples(FIELD, st.sampled_from(("COMPLETED", "FAILED", "PENDING", "RUNNING", "ODD")), FIELD, FIELD)))
def test_whatever_stands_in_the_fields_of_a_job(lines: list[tuple[str, str, str, str]]) -> None:
    text = "\n".join("  ".join(fields) for fields in lines)
    state = parse_state(text)
    assert state.exit_status is None or 0 <= state.exit_status <= 255
    assert isinstance(runs(text), bool) and isinstance(is_on_hold(text), bool)


@given(st.text(max_size=30) | FIELD | st.from_regex(r"[0-9]{1,3}(\[[0-9]*\]|_[0-9]*)?(\..*)?"))
def test_whatever_a_user_calls_a_job(named: str) -> None:
    """What is given on to Slurm's commands is never an option, and one job."""
    try:
        job = slurm_id(named)
    except VTorqueError as err:
        assert err.code is Code.VALUE
        return
    assert re.fullmatch(r"[0-9]+(_[0-9]+)?", job)


@given(st.text(max_size=60), st.text(max_size=20))
def test_whatever_scontrol_tells_of_the_cluster(around: str, name: str) -> None:
    try:
        found = parse_cluster(f"{around}\nClusterName   = {name}")
    except VTorqueError as err:
        assert err.code is Code.ENGINE
        return
    assert found and len(found) < 256 and not any(char.isspace() for char in found)


def test_nodes() -> None:
    assert parse_nodes("n1\nn1\nn2\n n3 \nodd name\n-x\n") == ("n1", "n2", "n3")


def test_the_clusters_name() -> None:
    assert (
        parse_cluster("Configuration data as of x\nBatchStartTimeout = 10 sec\nClusterName             = ref\n")
        == "ref"
    )
    with pytest.raises(VTorqueError, match="does not say its cluster's name"):
        parse_cluster("ClusterName             = \n")


@pytest.mark.parametrize(
    ("named", "job"),
    [("12", "12"), ("12.ref", "12"), ("12_3", "12_3"), ("12[3]", "12_3"), ("12[3].ref", "12_3"), ("12-3.ref", "12_3")],
)
def test_ids(named: str, job: str) -> None:
    assert slurm_id(named) == job


@pytest.mark.parametrize("named", ["", "x", "-1", "12 13", "12,13", "12_", "12[]", "all", "12.a b", "1\n2"])
def test_no_ids(named: str) -> None:
    with pytest.raises(VTorqueError) as problem:
        slurm_id(named)
    assert problem.value.code is Code.VALUE


def test_versions() -> None:
    assert parse_version("slurm-wlm 22.05.8\n") == (22, 5) and parse_version("slurm 26.11.0-0rc1\n") == (26, 11)
    with pytest.raises(VTorqueError, match="does not say its version"):
        parse_version("slurm\n")


@pytest.fixture
def engine(slurm: SlurmSite) -> Slurm:
    return Slurm(load_config(slurm.site.install))


def says(job: str) -> str:
    return f"echo '{LINES[job].strip()}'"


def test_state_from_squeue(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", says("345"))
    assert engine.state("345.ref") == JobState("completed", 3)
    assert slurm.calls("squeue") == ["-h -t all -O JobID:32,State:32,exit_code:16,Reason:64 -j 345"]
    slurm.program("squeue", UNKNOWN)
    assert engine.state("345") == JobState("gone")
    slurm.program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert engine.state("345") == JobState("unknown")
    assert engine.state("345; rm") == JobState("unknown")


def test_a_users_view_of_the_queue_hides_no_job(
    engine: Slurm, slurm: SlurmSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SQUEUE_PARTITION` and its like are as options of squeue are: files of a job that is gone are taken away."""
    for name in (
        "SQUEUE_PARTITION",
        "SQUEUE_USERS",
        "SQUEUE_FORMAT",
        "SINFO_PARTITION",
        "SCONTROL_SIB",
        "SLURM_CLUSTERS",
    ):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CONF", "/site/slurm.conf")
    slurm.program(
        "squeue",
        f"case $(env) in *SQUEUE_*|*SINFO_*|*_SIB*|*CLUSTERS*) exit 0 ;; *SLURM_CONF=/site*) {says('347')} ;; esac",
    )
    assert engine.state("347.ref").phase == "running"


def test_a_squeue_that_is_missing(engine: Slurm) -> None:
    with pytest.raises(VTorqueError, match="/squeue to wait for the job"):
        engine.check_state()


def test_holding(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("scontrol", "exit 0")
    for job, new in (("353", True), ("347", False), ("348", False)):
        slurm.program("squeue", says(job))
        assert engine.hold(f"{job}.ref", 5) is new
    assert slurm.calls("scontrol") == ["uhold 353", "uhold 347", "uhold 348"]


def test_releasing(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("scontrol", "exit 0")
    slurm.program("squeue", says("348"))
    engine.release("348", 5)
    slurm.program("squeue", "echo '347 PENDING 0 job requeued in held state'")  # by scontrol requeuehold
    engine.release("347", 5)
    assert slurm.calls("scontrol") == ["release 348", "release 347"]
    slurm.program("squeue", says("353"))
    with pytest.raises(VTorqueError, match="job 353 is not held"):
        engine.release("353", 5)


def test_queueing_again(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("scontrol", "exit 0")
    slurm.program("squeue", says("347"))
    engine.requeue("347", 5)
    assert slurm.calls("scontrol") == ["requeue 347"]
    for job in ("14", "348"):
        slurm.program("squeue", says(job))
        with pytest.raises(VTorqueError, match="is not running"):
            engine.requeue(job, 5)


@pytest.mark.parametrize(
    ("said", "code", "text"),
    [
        ("Access/permission denied for job 347\nslurm_suspend error: x", Code.ACCESS, "permission denied for job 347"),
        ("Invalid user id for job 347\nslurm_suspend error: x", Code.ACCESS, "Invalid user id for job 347"),
        ("Job has already finished for job 347", Code.ENGINE, "Job has already finished for job 347"),
    ],
)  # fmt: skip
def test_what_slurm_refuses(said: str, code: Code, text: str, engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", says("347"))
    slurm.program("scontrol", f"printf '%s\\n' '{said}' >&2; exit 1")
    with pytest.raises(VTorqueError, match=text) as problem:
        engine.requeue("347", 5)
    assert problem.value.code is code


MARKED = f"vtorque:/home/carol/.vtorque/abcd1234efgh/{'0123456789abcdef' * 4}"


@pytest.mark.parametrize(
    ("comment", "own"),
    [
        (MARKED, ""), (f"{MARKED} mine", "mine"), (f"{MARKED}  a=b\n\nc ", " a=b\n\nc "), ("mine", None), ("", None),
        ("(null)", None), ("vtorque:mine", None),
    ],
)  # fmt: skip
def test_giving_a_comment_back(comment: str, own: Optional[str], engine: Slurm, slurm: SlurmSite) -> None:
    """What its user has changed meanwhile stays as it is."""
    (slurm.site.base / "comment").write_text(f"{comment}\n")
    slurm.program("squeue", f"cat {slurm.site.base}/comment")
    slurm.program("scontrol", f'printf %s. "$3" >{slurm.site.base}/given')
    engine.give_back("13_3", 5)
    assert slurm.calls("squeue") == ["-h -t all -o %k -j 13_3"]
    if own is None:
        assert slurm.calls("scontrol") == []
    else:
        assert slurm.calls("scontrol")[0].startswith("update JobId=13_3 Comment=")
        assert (slurm.site.base / "given").read_text() == f"Comment={own}."


def test_the_end_of_a_job_does_not_wait_long_for_slurm(
    slurm: SlurmSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vsub.batch.installation", lambda: slurm.site.install)
    monkeypatch.setattr("vsub.batch.LAST_SECONDS", 0.2)
    slurm.program("squeue", "exec sleep 600")
    assert batch_main(["give-back", "12"]) == Code.ENGINE.status
    assert "squeue has not answered within 0.2 s" in capsys.readouterr().err


ARRAY = "17|16|1\n18|16|2\n16|16|3"
"""Its last member to start has its number."""


@pytest.mark.parametrize(
    ("named", "told", "whole"),
    [
        ("16_3", "16|16|3", "16.ref"), ("16[1]", "17|16|1", "17.ref"), ("16_1.ref", "17|16|1", "17.ref"),
        ("17", "17|16|1", "17.ref"), ("12", "12|12|N/A", "12.ref"), ("12", "", "12.ref"), ("16.ref", ARRAY, "16.ref"),
        ("16", "16|16|3", "16.ref"),
    ],
)  # fmt: skip
def test_a_job_by_its_own_number(named: str, told: str, whole: str, engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", f"printf '%s\\n' '{told}'" if told else UNKNOWN)
    assert engine.whole(named, 5) == whole


def test_an_array_is_no_job_of_its_own(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", f"case $* in *-O*) {says('347')} ;; *) printf '%s\\n' '{ARRAY}\n19|16|4' ;; esac")
    for ask in (engine.whole, engine.hold, engine.release, engine.requeue):
        with pytest.raises(
            VTorqueError, match=r"job 16 is a job array with the members 16_1, 16_2, 16_3, \.{3}"
        ) as problem:
            ask("16", 5)
        assert problem.value.code is Code.VALUE
    assert not [call for call in slurm.calls("scontrol") if call != "show config"]


def test_a_member_is_changed_alone(engine: Slurm, slurm: SlurmSite) -> None:
    """By the number of its array Slurm changes all members."""
    slurm.program("scontrol", "exit 0")
    slurm.program("squeue", f"case $* in *-O*) {says('347')} ;; *) printf '{ARRAY}\\n' ;; esac")
    engine.requeue("16.ref", 5)
    engine.hold("17.ref", 5)
    engine.hold("16_2", 5)
    assert slurm.calls("scontrol") == ["requeue 16_3", "uhold 16_1", "uhold 16_2"]
    slurm.program("squeue", "printf '16|16|3\\n16|16|4\\n'")  # none of them has started
    with pytest.raises(VTorqueError, match="is a job array with the members 16_3, 16_4"):
        engine.hold("16.ref", 5)


def test_the_nodes_of_a_member(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("scontrol", "echo 'ClusterName = ref'")
    slurm.program("squeue", "printf '17|carol|n1\\n16|carol|n2\\n'")
    assert [job.job_id for job in engine.placed("16", 5)] == ["17.ref", "16.ref"]
    assert [job.job_id for job in engine.placed("16.ref", 5)] == ["16.ref"]


def test_a_member_that_slurm_has_forgotten(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", UNKNOWN)
    with pytest.raises(VTorqueError, match="job 16_3 is not known to Slurm, and so not its own number"):
        engine.whole("16_3", 5)


@given(st.text(max_size=80))
def test_whatever_stands_for_members(text: str) -> None:
    for member in parse_members(text):
        assert slurm_id(member.name) == member.name


def test_a_job_that_slurm_does_not_know(engine: Slurm, slurm: SlurmSite) -> None:
    slurm.program("squeue", UNKNOWN)
    for change in (engine.hold, engine.release, engine.requeue):
        with pytest.raises(VTorqueError, match="job 12 is not known to Slurm"):
            change("12.ref", 5)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["server"], '"ref"\n'),
        (["whole", "7"], '"7.ref"\n'),
        (["nodes"], '["n1", "n2"]\n'),
        (["jobs"], '[{"job": "7.ref", "owner": "carol", "nodes": ["n1", "n2"]}]\n'),
        (["job", "7"], '[{"job": "7.ref", "owner": "carol", "nodes": ["n1", "n2"]}]\n'),
        (["hold", "347.ref"], '{"new": false}\n'),
        (["release", "347"], "{}\n"),
        (["requeue", "347_1"], "{}\n"),
        (["give-back", "347_1"], "{}\n"),
    ],
)
def test_vtorque_batch(
    words: list[str],
    answer: str,
    slurm: SlurmSite,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vsub.batch.installation", lambda: slurm.site.install)
    slurm.program("sinfo", "printf 'n1\\nn2\\nn2\\n'")
    slurm.program("squeue", f"case $* in *-r*) echo '7|carol|n[1-2]' ;; *) {says('347')} ;; esac")
    assert batch_main(words) == 0
    assert capsys.readouterr().out == answer


def test_who_may_queue_jobs_again(engine: Slurm, slurm: SlurmSite, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.program("scontrol", "echo 'SlurmUser               = slurm(64030)'")
    for uid, may in ((0, True), (64030, True), (1000, False)):
        monkeypatch.setattr("os.geteuid", lambda uid=uid: uid)
        if may:
            engine.check_requeue(5)
        else:
            with pytest.raises(VTorqueError, match="only root and SlurmUser"):
                engine.check_requeue(5)
