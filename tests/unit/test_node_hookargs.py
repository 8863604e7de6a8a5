"""What a hook makes of TORQUE's arguments: real ones, and whatever a user can put into them."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.jobspec import SpecPath
from vmgr.node.hookargs import guest_job, member_index, own_job, parse_epilogue, parse_prologue, passed, place_name
from vmgr.node.hookcall import GroupPath, HookCall, OwnJob

SHA = "0123456789abcdef" * 4
DIRECTORY = SpecPath("/home/carol", "abcd1234efgh", SHA)
WRAPPER = f"{DIRECTORY.directory}/prologue"
TASK_FILE = "/var/spool/torque/mom_priv/jobs/63.head.cluster.JB"
RESOURCES = f"nodes=2:ppn=1,mem=64mb,walltime=00:05:00,prologue={WRAPPER},other=vtorque:abc,neednodes=2:ppn=1"
PROLOGUE = [
    "63.head.cluster", "carol", "chem", "job.sh", RESOURCES, "batch", "",
    "/var/spool/torque/mom_priv/jobs/63.head.cluster.SC",
]  # fmt: skip
EPILOGUE = [
    "63.head.cluster", "carol", "chem", "job.sh", "4242", RESOURCES, "cput=00:00:00,mem=0kb,vmem=0kb,walltime=00:00:01",
    "batch", "", "0", "/var/spool/torque/mom_priv/jobs/63.head.cluster.SC",
]  # fmt: skip


def test_a_real_prologue() -> None:
    call = parse_prologue(PROLOGUE, {"PBS_NODENUM": "1"})
    groups = (GroupPath("torque", "63.head.cluster"),)
    assert call == HookCall("63.head.cluster", "carol", DIRECTORY, 1, "batch", TASK_FILE, groups=groups)


def test_the_files_about_a_jobs_nodes() -> None:
    call = parse_prologue(PROLOGUE, {"PBS_NODENUM": "0", "PBS_NODEFILE": "/var/spool/torque/aux/63.head.cluster"})
    assert call.node_file == "/var/spool/torque/aux/63.head.cluster" and call.task_file == TASK_FILE
    for script in ("", "jobs/63.SC", "/jobs/63", "/jobs/63.JB"):
        assert parse_prologue([*PROLOGUE[:7], script], {}).task_file is None
    call = parse_prologue(PROLOGUE[:5], {"PBS_NODEFILE": ""})
    assert (call.task_file, call.node_file, call.nodes) == (None, None, None)


def test_a_real_epilogue() -> None:
    call = parse_epilogue(EPILOGUE, {})
    assert call == HookCall("63.head.cluster", "carol", DIRECTORY, 0, "batch")


@pytest.mark.parametrize("job_id", ["63-1.head", "63[].head", "63[7].head", "1.a", "12345678901234567890.head-1.x"])
def test_job_ids_of_torque(job_id: str) -> None:
    assert parse_prologue([job_id, *PROLOGUE[1:]], {}).job_id == job_id


@pytest.mark.parametrize(
    "job_id",
    [
        "", "63", ".head", "63.", "63.head/../../etc", "../63.head", "63..head", "63.he..ad", "63.head\n", "63.head\0",
        "63.head x", "-1.head", "63[.head", "63[1.head", "\uff16\uff13.head", "63.head\udcff", "6" * 10_000 + ".head",
        "63." + "h" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_job_id(job_id: str) -> None:
    for parse, argv in ((parse_prologue, PROLOGUE), (parse_epilogue, EPILOGUE)):
        with pytest.raises(ValueError, match="no job id") as caught:
            parse([job_id, *argv[1:]], {})
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "user",
    [r"LAB\carol", "LAB+carol", r"LAB\ws-7$", "carol@lab.example.org", "9carol", "_carol", "a.b-c", "c" * 64 + "$"],
)
def test_users_of_directory_services(user: str) -> None:
    assert parse_prologue([PROLOGUE[0], user, *PROLOGUE[2:]], {}).user == user
    assert parse_epilogue([EPILOGUE[0], user, *EPILOGUE[2:]], {}).user == user


@FUZZ
@given(st.text(st.sampled_from("a7_.@+-\\$/:, ;|'\"\n\0\u00e9\udcff"), max_size=6) | st.text(max_size=80))
def test_whatever_a_user_is_called(user: str) -> None:
    """What is taken is one word for a shell's list, for passwd(5), for a path and for a line of sshd_config(5)."""
    try:
        taken = parse_prologue([PROLOGUE[0], user, *PROLOGUE[2:]], {}).user
    except ValueError as err:
        assert "allowed are letters, digits" in str(err) and len(str(err)) < 600 and str(err).isprintable()
        return
    assert taken == user and user.isascii() and user.isprintable() and len(user) <= 65
    assert not set(user) & set("/:, ;|'\"#*?%") and user[0] not in ".-+@\\$" and user[-1] != "\\"


@pytest.mark.parametrize(
    "user",
    [
        "",
        "-carol",
        "carol\n",
        "../carol",
        "a/b",
        "c" * 100,
        "carol;id",
        "caròl",
        "$",
        "a b",
        "a:b",
        "LAB\\",
        "+",
        "\\a",
    ],
)
def test_what_is_no_user(user: str) -> None:
    with pytest.raises(ValueError, match="no user name"):
        parse_prologue([PROLOGUE[0], user, *PROLOGUE[2:]], {})


@pytest.mark.parametrize(
    ("queue", "known"),
    [("", None), ("fast", "fast"), ("long-1_x.y", "long-1_x.y"), ("q" * 64, "q" * 64), ("batch@head", "batch@head"),
     ("a+b", "a+b"), ("q:r", "q:r"), ("9", "9")],
)  # fmt: skip
def test_queues(queue: str, known: Optional[str]) -> None:
    assert parse_prologue([*PROLOGUE[:5], queue, *PROLOGUE[6:]], {}).queue == known
    assert parse_epilogue([*EPILOGUE[:7], queue, *EPILOGUE[8:]], {}).queue == known
    assert parse_prologue(PROLOGUE[:5], {}).queue is None and parse_epilogue(EPILOGUE[:7], {}).queue is None


@pytest.mark.parametrize(
    "queue", ["a b", "-x", "../x", "a/b", "q" * 65, "fast\n", "\0", "+x", "a,b", "qu\u00e9", "\udcff"]
)
def test_what_is_no_queue_starts_nothing_but_ends_what_there_is(queue: str) -> None:
    with pytest.raises(ValueError, match="no queue"):
        parse_prologue([*PROLOGUE[:5], queue, *PROLOGUE[6:]], {})
    assert parse_epilogue([*EPILOGUE[:7], queue, *EPILOGUE[8:]], {}).queue is None


@pytest.mark.parametrize(
    ("job_id", "index"),
    [
        ("63.head", None), ("63[7].head", 7), ("63[0].head", 0), ("63-12.head", 12), ("63[].head", None), ("", None),
        ("63[12345678901].head", None), ("63[7]", None), ("x[7].head", None), ("63.head[7].x", None),
    ],
)  # fmt: skip
def test_members_of_job_arrays(job_id: str, index: Optional[int]) -> None:
    assert member_index(job_id) == index


@pytest.mark.parametrize("count", range(5))
def test_too_few_arguments(count: int) -> None:
    with pytest.raises(ValueError, match="8 arguments"):
        parse_prologue(PROLOGUE[:count], {})
    with pytest.raises(ValueError, match="11 arguments"):
        parse_epilogue(EPILOGUE[:count], {})


@pytest.mark.parametrize("index", ["", "-1", "1x", "9" * 12, "0x1"])
def test_a_strange_node_index_is_the_first(index: str) -> None:
    assert parse_prologue(PROLOGUE, {"PBS_NODENUM": index}).node_index == 0


@pytest.mark.parametrize(
    ("resources", "found"),
    [
        (f"prologue={WRAPPER}", DIRECTORY),
        (f"nodes=1,prologue={WRAPPER}", DIRECTORY),
        (f"prologue={WRAPPER},prologue=/home/other/prologue", DIRECTORY),
        (f"prologue=/home/other/prologue,prologue={WRAPPER}", None),
        (f"other=prologue={WRAPPER}", None),
        (f"xprologue={WRAPPER}", None),
        (f"prologue={WRAPPER}x", None),
        (f"prologue={WRAPPER}/", None),
        (f"prologue={DIRECTORY.directory}", None),
        (f"prologue={DIRECTORY.directory}/epilogue", None),
        (f"prologue={DIRECTORY.directory}//prologue", None),
        (f"prologue=/home/carol/../root/.vtorque/abcd1234/{SHA}/prologue", None),
        (f"prologue=/home/./carol/.vtorque/abcd1234/{SHA}/prologue", None),
        (f"prologue=home/carol/.vtorque/abcd1234/{SHA}/prologue", None),
        (f"prologue=/.vtorque/abcd1234/{SHA}/prologue", None),
        (f"prologue=/home/carol/.vtorque/../{SHA}/prologue", None),
        (f"prologue=/home/carol/.vtorque/abcd1234/{SHA[:-1]}/prologue", None),
        (f"prologue=/home/carol/.vtorque/abcd1234/{SHA.upper()}/prologue", None),
        (f"prologue=/home/ca rol/.vtorque/abcd1234/{SHA}/prologue", None),
        (f"prologue=/home/ca\nrol/.vtorque/abcd1234/{SHA}/prologue", None),
        ("prologue", None),
        ("prologue=", None),
        ("", None),
        (",,,", None),
        (f"prologue=/{'a' * 2000}/.vtorque/abcd1234/{SHA}/prologue", None),
    ],
)
def test_which_jobs_have_guests(resources: str, found: Optional[SpecPath]) -> None:
    assert guest_job(resources) == found


def test_items_dropped_behind_the_first_one_cost_nothing() -> None:
    full = [f"prologue={WRAPPER}", *(f"other{n}={'x' * 200}" for n in range(20))]
    for kept in range(1, len(full)):
        assert guest_job(",".join(full[:kept])) == DIRECTORY


_PIECES = st.lists(
    st.sampled_from(
        ["prologue=", "/", "..", ".", "home", ".vtorque", "abcd1234", SHA, "prologue", ",", "=", "\n", "\0", " ", "é"]
    )
    | st.text(max_size=4),
    max_size=14,
).map("".join)


@FUZZ
@given(st.lists(_PIECES | st.text(max_size=40), max_size=12), st.dictionaries(st.just("PBS_NODENUM"), st.text()))
def test_arbitrary_arguments_end_in_a_call_or_a_value_error(argv: list[str], environ: dict[str, str]) -> None:
    for parse in (parse_prologue, parse_epilogue):
        try:
            call = parse(argv, environ)
        except ValueError:
            continue
        assert "/" not in call.job_id and ".." not in call.job_id
        assert call.node_index >= 0
        assert call.queue is None or (0 < len(call.queue) <= 64 and call.queue.isascii() and "/" not in call.queue)


@FUZZ
@given(_PIECES)
def test_a_directory_found_has_the_form_of_one(resources: str) -> None:
    found = guest_job(resources)
    if found is not None:
        assert found.home.startswith("/") and not {"..", "."} & set(found.home.split("/"))
        assert len(found.sha256) == 64 and found.ruid.isalnum()
        assert f"prologue={found.directory}/prologue" in resources.split(",")


@FUZZ
@given(st.lists(st.from_regex(r"[0-9]{1,20}\.[A-Za-z0-9][A-Za-z0-9-]{0,200}", fullmatch=True), unique=True, min_size=2))
def test_place_names_are_short_and_tell_jobs_apart(job_ids: list[str]) -> None:
    names = {place_name(job_id) for job_id in job_ids}
    assert len(names) == len(job_ids)
    assert all(len(name) <= 40 and "/" not in name for name in names)


def test_a_place_name_is_the_job_id_where_that_is_short() -> None:
    assert place_name("63.head.cluster") == "63.head.cluster"


def test_a_jobs_own_process() -> None:
    assert own_job({"PBS_JOBID": "63[7].head"}) == OwnJob("63[7].head", 7)
    assert own_job({"PBS_JOBID": "63.head"}) == OwnJob("63.head") and own_job({}) == OwnJob("")
    environment = {"PBS_JOBID": "63.head", "SLURM_X": "mine"}
    assert passed(environment) == environment
    assert parse_prologue(["63[7].head", *PROLOGUE[1:]], {}).tag == "7"
