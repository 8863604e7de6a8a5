"""What a hook makes of Slurm's environment: a real one, and whatever a user can put into it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.jobspec import SpecPath
from vmgr.node import allocation, batch, nodelist, record, slurmfacts
from vmgr.node.checkedjob import Call
from vmgr.node.hookcall import HookCall, OwnJob
from vmgr.node.nodelist import expand
from vmgr.node.slurmgroups import group_paths

SHA = "0123456789abcdef" * 4
DIRECTORY = SpecPath("/home/carol", "abcd1234efgh", SHA)
COMMENT = f"vtorque:{DIRECTORY.directory}"
PROLOG = {
    "SLURMD_NODENAME": "n2", "SLURM_CLUSTER_NAME": "ref", "SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_JOB_ID": "12",
    "SLURM_JOB_COMMENT": COMMENT, "SLURM_JOB_CPUS_PER_NODE": "2(x3)", "SLURM_JOB_GID": "4712", "SLURM_JOB_UID": "4711",
    "SLURM_JOB_USER": "carol", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_PARTITION": "batch",
    "SLURM_JOB_RESTART_COUNT": "1", "SLURM_JOB_WORK_DIR": "/home/carol", "SLURM_NODELIST": "n[1-3]",
    "SLURM_SCRIPT_CONTEXT": "prolog_slurmd",
}  # fmt: skip
INSIDE = {
    "SLURM_JOB_ID": "14", "SLURM_CLUSTER_NAME": "ref", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_ON_NODE": "4", "SLURM_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
}  # fmt: skip
NUMBER = st.text(st.sampled_from("0123\u00b2\u0663"), max_size=12)
"""Digits of all kinds: of some of them int() makes numbers, of others it does not."""
EPILOG = {**PROLOG, "SLURM_SCRIPT_CONTEXT": "epilog_slurmd", "SLURM_JOB_EXIT_CODE": "0"}


def test_a_real_prolog() -> None:
    call = slurmfacts.parse_prologue([], PROLOG)
    key = slurmfacts.attempt_key("ref", 12, 1)
    assert call == HookCall(
        "12.ref", "carol", DIRECTORY, 1, "batch", nodes=("n1", "n2", "n3"), key=key, tag="12",
        groups=group_paths("n2", 4711, 12, None),
    )  # fmt: skip
    found = Call.of(json.loads(json.dumps({**call._asdict(), "directory": list(DIRECTORY)})))
    assert found.groups == call.groups
    assert found.nodes is not None and found.key is not None
    told = allocation.given(found.nodes, found.node_index, found.key)
    assert (told.name, told.key, len(key), int(key, 16) > 0) == ("n2", key, allocation.KEY_DIGITS, True)


def test_a_real_epilog() -> None:
    assert slurmfacts.parse_epilogue([], EPILOG) == HookCall("12.ref", "carol", None, 0, None), (
        "whatever its comment is"
    )
    for name in ("SLURM_NODELIST", "SLURMD_NODENAME", "SLURM_JOB_RESTART_COUNT", "SLURM_JOB_PARTITION"):
        assert slurmfacts.parse_epilogue([], {**EPILOG, name: "?"}).job_id == "12.ref", "it ends a job all the same"


def test_an_attempt_has_a_key_of_its_own() -> None:
    attempts = [("ref", 12, 0), ("ref", 12, 1), ("ref", 121, 0), ("other", 12, 0)]
    assert len({slurmfacts.attempt_key(*attempt) for attempt in attempts}) == len(attempts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_JOB_ID", ""), ("SLURM_JOB_ID", "0"), ("SLURM_JOB_ID", "../12"), ("SLURM_JOB_ID", "12\n"),
        ("SLURM_JOB_ID", "12_3"), ("SLURM_JOB_ID", "\uff11"), ("SLURM_JOB_ID", "1" * 11),
        ("SLURM_CLUSTER_NAME", ""), ("SLURM_CLUSTER_NAME", "a/b"), ("SLURM_CLUSTER_NAME", ".."),
        ("SLURM_CLUSTER_NAME", "c" * 100), ("SLURM_CLUSTER_NAME", "-ref"), ("SLURM_CLUSTER_NAME", "ref\n"),
        ("SLURM_JOB_USER", ""), ("SLURM_JOB_USER", "-carol"), ("SLURM_JOB_USER", "a/b"), ("SLURM_JOB_USER", "carol;id"),
        ("SLURM_JOB_RESTART_COUNT", ""), ("SLURM_JOB_RESTART_COUNT", "-1"), ("SLURM_JOB_RESTART_COUNT", "1e3"),
        ("SLURM_JOB_PARTITION", "-x"), ("SLURM_JOB_PARTITION", "p\n"), ("SLURM_JOB_PARTITION", "p" * 65),
        ("SLURMD_NODENAME", ""), ("SLURMD_NODENAME", "n4"), ("SLURMD_NODENAME", "n[1-3]"),
        ("SLURM_NODELIST", ""), ("SLURM_NODELIST", "n[1-"), ("SLURM_NODELIST", "../n2"), ("SLURM_NODELIST", "n[2,2]"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError) as caught:
        slurmfacts.parse_prologue([], {**PROLOG, name: value})
    assert len(str(caught.value)) < 600
    without = {key: text for key, text in PROLOG.items() if key != name}
    if name != "SLURM_JOB_PARTITION":
        with pytest.raises(ValueError):
            slurmfacts.parse_prologue([], without)
    else:
        assert slurmfacts.parse_prologue([], without).queue is None


@pytest.mark.parametrize("user", [r"LAB\carol", "LAB+carol", "carol@lab.example.org", "host$", "9carol"])
@pytest.mark.parametrize("partition", ["a+b", "x.y@z", "q:r", "9", "_", "gpu-a100"])
def test_names_of_real_sites(user: str, partition: str) -> None:
    """Slurm 22.05 takes these partitions, and gives them to a Prolog as they are."""
    call = slurmfacts.parse_prologue([], {**PROLOG, "SLURM_JOB_USER": user, "SLURM_JOB_PARTITION": partition})
    assert (call.user, call.queue) == (user, partition)
    assert slurmfacts.parse_epilogue([], {**EPILOG, "SLURM_JOB_USER": user}).user == user


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_JOB_USER", "a b", r"SLURM_JOB_USER is 'a b': allowed are letters, digits, _ . @ + - and \ (64 at most"),
        ("SLURM_JOB_PARTITION", "a,b", "'a,b' is no partition: allowed are letters, digits, _ . @ + - and : (64 at"),
    ],
)
def test_a_refusal_says_what_is_allowed(name: str, value: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        slurmfacts.parse_prologue([], {**PROLOG, name: value})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("comment", "directory"),
    [
        (COMMENT, DIRECTORY),
        (f"{COMMENT} a comment of the user's: vtorque:/x", DIRECTORY),
        (f"{COMMENT}\nsecond line", DIRECTORY),
        ("", None), ("mine", None), ("vtorque:", None), (f" {COMMENT}", None), (f"{COMMENT}/prologue", None),
        (f"vtorque: {DIRECTORY.directory}", None), (f"vtorque:{DIRECTORY.directory[:-1]}", None),
        (f"vtorque:relative/.vtorque/abcd1234efgh/{SHA}", None),
    ],
)  # fmt: skip
def test_comments(comment: str, directory: Any) -> None:
    assert slurmfacts.parse_prologue([], {**PROLOG, "SLURM_JOB_COMMENT": comment}).directory == directory


@FUZZ
@given(st.text(max_size=200))
def test_whatever_a_user_comments(comment: str) -> None:
    for text in (comment, f"vtorque:{comment}", f"{COMMENT}{comment}"):
        found = slurmfacts.guest_job(text)
        assert found is None or f"vtorque:{found.directory}" == text[: len(found.directory) + 8]


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(PROLOG)), st.text(max_size=40), max_size=4))
def test_whatever_stands_in_the_environment(changed: dict[str, str]) -> None:
    try:
        call = slurmfacts.parse_prologue([], {**PROLOG, **changed})
    except ValueError:
        return
    assert call.nodes is not None and call.nodes[call.node_index] == {**PROLOG, **changed}["SLURMD_NODENAME"]
    assert "/" not in call.job_id and "/" not in call.user and not call.job_id.startswith(".")


@FUZZ
@given(st.dictionaries(st.sampled_from((*INSIDE, "SLURM_CPUS_ON_NODE", "MINE")), st.text(max_size=20) | NUMBER))
def test_whatever_a_job_has_made_of_its_own_variables(changed: dict[str, str]) -> None:
    """The wrapper's environment is the user's."""
    environment = {**INSIDE, **changed}
    told = slurmfacts.passed(environment)
    assert told.get("PBS_NP", "0").isdecimal() and "SLURM_NODELIST" not in told
    try:
        own = slurmfacts.own_job(environment)
    except ValueError:
        return
    assert own.job_id == f"{environment['SLURM_JOB_ID']}.{environment['SLURM_CLUSTER_NAME']}" and "/" not in own.job_id


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("a1,b[2,10],z9", ["a1", "b2", "b10", "z9"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("login.cluster,n[3]", ["login.cluster", "n3"]),
    ],
)
def test_lists_of_nodes(text: str, nodes: list[str]) -> None:
    assert list(expand(text)) == nodes


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "n1,", ",n1", "n1,,n2", "n1 n2", "n[]", "n[1", "n1]", "n[1-]", "n[-1]", "n[2-1]", "n[1,]", "n[[1]]",
        "n1,n1", "n[1-3],n2", "../n1", "n1/0", "-n1", "n1-", "n.", "n\n", "n[1-3]\n", "\uff4e1", "n[\uff11]",
        "n[1-999999]", "n[1-1000][1-1000]", "n[0-9999999999]", "n[1-9]" + "[1-9]" * 30, "n[" + "1," * (1 << 20) + "1]",
    ],
)  # fmt: skip
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(text)
    assert len(str(caught.value)) < 600


def test_so_many_nodes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodelist, "MAX_NODES", 6)
    assert len(expand("n[1-3],m[1-3]")) == 6
    for text in ("n[1-7]", "n[1-4],m[1-3]", "n[1-3],m[1-3],x", "n[1-3][1-3]"):
        with pytest.raises(ValueError, match="more than 6 nodes"):
            expand(text)


@FUZZ
@given(st.text(st.sampled_from("n12,[]-.x0"), max_size=30))
def test_whatever_a_list_of_nodes_holds(text: str) -> None:
    try:
        nodes = expand(text)
    except ValueError:
        return
    assert nodes and len(set(nodes)) == len(nodes) and all(allocation.is_node(node) for node in nodes)
    assert expand(",".join(nodes)) == nodes


@FUZZ
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20, unique=True), st.integers(1, 4))
def test_numbers_are_as_wide_as_they_are_written(numbers: list[int], width: int) -> None:
    names = [f"n{number:0{width}d}" for number in numbers]
    assert list(expand(f"n[{','.join(name[1:] for name in names)}]")) == names


def test_a_jobs_own_process() -> None:
    inside = {"SLURM_JOB_ID": "14", "SLURM_CLUSTER_NAME": "ref", "SLURM_ARRAY_JOB_ID": "13", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurmfacts.own_job(inside) == OwnJob("14.ref", 3, may_come_back=True, marked="13_3")
    alone = slurmfacts.own_job({**inside, "SLURM_ARRAY_TASK_ID": ""})
    assert (alone.member, alone.marked) == (None, "14")
    for environment in ({}, {**inside, "SLURM_ARRAY_JOB_ID": "-a"}):
        with pytest.raises(ValueError):
            slurmfacts.own_job(environment)


@FUZZ
@given(st.text(max_size=40))
def test_a_users_own_comment_is_what_stands_behind_the_mark(own: str) -> None:
    assert slurmfacts.own_comment(f"{COMMENT} {own}") == own
    for whole in (own, f"vtorque:{own}", f" {COMMENT} {own}", f"vtorque:/home/carol/.vtorque/x {own}"):
        assert slurmfacts.own_comment(whole) is None
    assert slurmfacts.own_comment(COMMENT) == ""


def test_what_a_guest_is_told_has_nothing_that_leads_an_mpi_to_the_nodes() -> None:
    environment = {
        "PATH": "/bin", "SLURM_JOB_ID": "14", "SLURM_JOBID": "14", "SLURM_NODELIST": "n[1-3]", "SLURM_SUBMIT_DIR": "/x",
        "SLURM_JOB_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n1", "SLURM_TASKS_PER_NODE": "2", "SBATCH_EXPORT": "ALL",
        "SLURMX": "mine",
    }  # fmt: skip
    kept = sorted(name for name in slurmfacts.passed(environment) if not name.startswith("PBS_"))
    assert kept == ["PATH", "SLURMX", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR"]


@pytest.mark.parametrize(("conf", "known"), [("/etc/slurm/slurm.conf", True), ("", False), ("slurm.conf", False)])
def test_commands_find_slurm_where_slurmd_does(conf: str, known: bool) -> None:
    assert slurmfacts.for_commands({**PROLOG, "SLURM_CONF": conf}) == ({"SLURM_CONF": conf} if known else {})
    assert batch.facts("torque").for_commands(PROLOG) == {}


def test_each_batch_system_has_its_facts() -> None:
    for engine in ("torque", "local", "slurm"):
        found = batch.facts(engine)
        for name in ("parse_prologue", "parse_epilogue", "leader", "own_job", "passed", "for_commands"):
            assert callable(getattr(found, name))
    assert batch.facts("slurm").own_job(PROLOG).job_id == "12.ref"


def test_the_start_of_a_hook_is_that_of_its_group() -> None:
    """slurmd starts hooks in its own session, each leading a group."""
    import sys

    from nodesite import REPOSITORY

    code = (
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r}); from vmgr.node import process, record, slurmfacts\n"
        "os.setpgid(0, 0)\n"
        "print(record.hook_start(slurmfacts.leader()) == process.start_ticks(os.getpid()))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(slurmfacts.leader() == os.getppid(), flush=True); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-Iuc", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\nTrue\n"
    assert record.hook_start(1) != record.hook_start()
