"""What lies in `mom_priv`: whatever type a user gives a job, root runs one of our hooks, in its own phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import REPOSITORY

from vmgr.deploy.hookfiles import (
    DEFAULT_JOB_TYPE,
    JOB_TYPE,
    MODES,
    SITE_FOLDER,
    WRAP,
    fill,
    hook_files,
    is_job_type,
    is_open_to_users,
    is_ours,
    site_hooks,
)

ROOTS = ("prologue", "prologue.parallel", "epilogue", "epilogue.parallel")
USERS = ("prologue.user", "prologue.user.parallel", "epilogue.user", "epilogue.user.parallel", "epilogue.precancel")
TYPES = st.sampled_from(
    ["", "orig", "new", "user", "parallel", "precancel", "user.parallel", "vtorque", "parallel.vtorque", "user.vtorque"]
) | st.text(st.sampled_from("abelopruv.-_/"), max_size=12)


def run_by_mom(hook: str, job_type: str, there: set[str]) -> str:
    """The file that a mom runs as a hook of a job of a type, by its rule; empty for none."""
    typed = f"{hook}.{job_type}"
    return typed if job_type and typed in there else hook if hook in there else ""


@given(site=st.sets(st.sampled_from(site_hooks(WRAP))), job_type=TYPES)
def test_in_wrap_root_runs_ours_whatever_a_user_names(site: set[str], job_type: str) -> None:
    ours = {hook.target: hook for hook in hook_files(WRAP) if hook.always or hook.target in site}
    assert site <= set(ours)  # each of the site's has one in its place, which runs it
    for hook in ROOTS:
        assert ours[run_by_mom(hook, job_type, set(ours))].source == hook.partition(".")[0]
    for hook in USERS:
        file = run_by_mom(hook, job_type, set(ours))
        assert file in ours or (not file and hook not in site)
        assert (file == "epilogue.precancel") == (hook == "epilogue.precancel" and bool(file))


@given(site=st.sets(st.sampled_from(site_hooks(WRAP))), suffix=TYPES)
def test_in_jobtype_those_of_our_type_run_ours_and_others_the_sites(site: set[str], suffix: str) -> None:
    ours = {hook.target: hook for hook in hook_files(JOB_TYPE)}
    assert not site & set(ours)
    for hook in ROOTS:
        assert ours[run_by_mom(hook, DEFAULT_JOB_TYPE, site | set(ours))].source == hook.partition(".")[0]
        file = run_by_mom(hook, suffix, site | set(ours))
        assert file in (*site, "") or ours[file].source == hook.partition(".")[0]
    for hook in USERS:
        assert run_by_mom(hook, DEFAULT_JOB_TYPE, site | set(ours)) == (hook if hook in site else "")


def test_files_of_a_mode_are_root_owned_hooks_from_the_repository() -> None:
    for mode in MODES:
        for hook in hook_files(mode):
            source = REPOSITORY / "mom_priv_hooks" / hook.source
            assert hook.mode & 0o022 == 0 and hook.mode & 0o505 == 0o505
            text = fill(source.read_text(), prefix="/opt/vtorque", spool="/var/spool/vtorque")
            assert is_ours(text.encode()) and "@" not in text.replace('"$@"', "")
    assert site_hooks(JOB_TYPE) == ()
    assert [hook.target for hook in hook_files(JOB_TYPE, "vm")] == [f"{name}.vm" for name in ROOTS]


def test_what_is_not_ours() -> None:
    for content in (b"", b"#!/bin/sh\n", b"#!/bin/sh\nexit 0\n# vTorque: x\n", b"\x7fELF" + bytes(9000)):
        assert not is_ours(content)
    assert is_ours(b"#!/bin/sh\n# vTorque: starts the node agent of a guest job.\n")  # of an earlier version


@pytest.mark.parametrize("word", ["parallel", "user", "precancel", "user.parallel", "a.b", "", "-x", "a/b", "x" * 33])
def test_types_that_would_hide_hooks(word: str) -> None:
    assert not is_job_type(word)
    with pytest.raises(ValueError, match="is no job type"):
        hook_files(JOB_TYPE, word)


def test_modes_that_there_are_not() -> None:
    for ask in (hook_files, site_hooks):
        with pytest.raises(ValueError, match="'both' is no mode of hooks: wrap or jobtype"):
            ask("both")


def test_names_that_users_can_have_run() -> None:
    assert is_open_to_users("prologue.orig") and is_open_to_users("epilogue.new")
    assert not any(is_open_to_users(name) for name in (SITE_FOLDER, ".prologue.new", "prologues", "config"))
