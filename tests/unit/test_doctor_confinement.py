"""What the doctor finds about AppArmor and SELinux."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY
from test_doctor import Make, Patient, levels, one, well
from test_doctor import make as make  # the fixture

from vmgr.doctor import confinement
from vmgr.doctor.confinement import Place
from vmgr.doctor.finding import Level
from vmgr.doctor.run import Ran

OK, NOTE, WARNING, FAILURE = Level.OK, Level.NOTE, Level.WARNING, Level.FAILURE
ON = {"sys/module/apparmor/parameters/enabled": "Y\n", "sys/kernel/security/lsm": "capability,yama,apparmor\n"}
LOADED = "vtorque-qemu (enforce)\nvtorque-virtiofsd (enforce)\n/usr/sbin/ntpd (enforce)\n"
PLACES = (
    "@{VTORQUE_IMAGES}=/\n@{VTORQUE_DISKS}=/tmp\n@{VTORQUE_SHARES}=/home /opt # and more\n@{VTORQUE_SHARES}+=/scratch\n"
)


def armored(profiles: str = LOADED, places: str = PLACES) -> dict[str, str]:
    return {**ON, "sys/kernel/security/apparmor/profiles": profiles, confinement.PLACES_FILE: places}


def check(patient: Patient) -> list[Any]:
    return list(confinement.check(patient))


def test_nothing_in_force(make: Make) -> None:
    one(check(make({"sys/kernel/security/lsm": "capability,landlock"})), NOTE, "neither", "landlock", "apparmor=1")


def test_our_profiles_with_all_that_is_needed(make: Make) -> None:
    well(check(make(armored(), workspace={"folder": "/scratch/{user}/{job}"})))


def test_profiles_that_are_not_loaded(make: Make) -> None:
    found = check(make(armored("/usr/sbin/ntpd (enforce)\n")))
    assert levels(found) == [NOTE, NOTE] and "apparmor_parser -r" in found[0].remedy


@pytest.mark.parametrize(
    ("mode", "level", "says"), [("enforce", FAILURE, "keep guests"), ("complain", WARNING, "would")]
)
def test_a_folder_that_the_profile_does_not_know(make: Make, mode: str, level: Level, says: str) -> None:
    mounts = [{"name": "data", "source": "/data/{user}", "target": "/data"}]
    profiles = LOADED.replace("enforce", mode)
    found = check(make(armored(profiles), mounts=mounts))
    one(found, level, says, "from /data (the share data)", "@{VTORQUE_SHARES}")
    assert check(make(armored(profiles, PLACES + "@{VTORQUE_SHARES}+=/data/\n"), mounts=mounts))[-1].level is OK


def test_every_kind_of_place(make: Make) -> None:
    node = make(
        {},
        workspace={"folder": "/scratch/{user}/{job}"},
        suspended={"folder": "/shared/suspended"},
        images={"pool": "/pool", "overlays": "/ssd/overlays", "cache": {"folder": "/ssd/cache"}},
        mounts=[
            {"name": "home", "source": "{home}", "target": "{home}"},
            {"name": "nfs", "kind": "nfs", "source": "s:/x", "target": "/x", "security": "krb5"},
        ],
    )
    found = {(place.path, place.key, place.variable) for place in confinement.places(node.config)}
    assert found >= {
        ("/pool", "images.pool", "VTORQUE_IMAGES"),
        ("/ssd/cache", "images.cache.folder", "VTORQUE_IMAGES"),
        ("/ssd/overlays", "images.overlays", "VTORQUE_DISKS"),
        ("/scratch", "workspace.folder", "VTORQUE_SHARES"),
        ("/shared/suspended", "suspended.folder", "VTORQUE_SHARES"),
        ("/home", "the share home", "VTORQUE_SHARES"),
    }
    assert not [place for place in found if "nfs" in place[1] or "workspace}" in place[0]]


def test_a_profile_of_somebody_elses(make: Make) -> None:
    node = make(armored("/usr/bin/qemu-system-x86_64 (enforce)\n"), hypervisor={"qemu": "/usr/bin/qemu-system-x86_64"})
    one(check(node), WARNING, "/usr/bin/qemu-system-x86_64 (enforce) is not vTorque's", "aa-disable")


def test_another_qemu(make: Make) -> None:
    one(
        check(make(armored(), hypervisor={"qemu": "/opt/qemu/bin/qemu"})), WARNING, "not attached to /opt/qemu/bin/qemu"
    )


def test_the_profile_is_attached_as_the_doctor_says() -> None:
    text = (REPOSITORY / "contrib" / "apparmor" / "vtorque").read_text()
    assert "\nprofile vtorque-qemu /usr/{bin/qemu-system-x86_64,libexec/qemu-kvm} flags=" in text
    assert confinement.ATTACHED == ("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")
    assert all(f"\nprofile {name} " in text for name in confinement.PROFILES)


def test_profiles_that_only_root_can_read(make: Make) -> None:
    one(check(make(dict(ON))), NOTE, "only root")


@pytest.mark.parametrize(
    ("listed", "level", "says"),
    [
        (Ran(0, "base\nvtorque\n", ""), OK, "its module vtorque is loaded"),
        (Ran(0, "base\n", ""), NOTE, "not loaded"),
        (Ran(-1, "", "", "semodule: not found"), NOTE, "only root"),
    ],
)
def test_selinux(make: Make, monkeypatch: pytest.MonkeyPatch, listed: Ran, level: Level, says: str) -> None:
    monkeypatch.setattr(confinement, "run", lambda argv: listed)
    (found,) = check(make({"sys/fs/selinux/enforce": "1"}))
    assert found.level is level and "SELinux is enforcing" in found.what and says in found.what


@pytest.mark.parametrize(("enforce", "level"), [("1", FAILURE), ("0", WARNING)])
def test_selinux_without_executable_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch, enforce: str, level: Level
) -> None:
    monkeypatch.setattr(confinement, "run", lambda argv: Ran(0, "vtorque\n", ""))
    tree = {"sys/fs/selinux/enforce": enforce, "sys/fs/selinux/booleans/deny_execmem": "1 1"}
    one(check(make(tree, hypervisor={"allow_emulation": True})), level, "deny_execmem", "setsebool")
    well(check(make(tree, hypervisor={"allow_emulation": False})))


def test_who_may_trace(make: Make) -> None:
    found = check(make({**armored(), "proc/sys/kernel/yama/ptrace_scope": "0"}))
    assert found[-1].level is NOTE and "ptrace_scope" in found[-1].what


def test_variables_are_read_as_apparmor_reads_them() -> None:
    text = '# @{VTORQUE_NOT}=/x\n@{VTORQUE_A} = /a "/b"\n@{VTORQUE_A} += /c\n@{OTHER}=/d\n@{VTORQUE_A}+=/e # f\n'
    assert confinement.read_variables(text) == {"VTORQUE_A": ["/a", "/b", "/c", "/e"]}


def test_folders_beside_each_other_are_told_apart() -> None:
    needed = [Place("/data2", "k", "VTORQUE_A")]
    assert levels(confinement.judge_places({"VTORQUE_A": ["/data"]}, needed, enforced=True)) == [FAILURE]
    assert levels(confinement.judge_places({"VTORQUE_A": ["/data2/"]}, needed, enforced=True)) == [OK]


@FUZZ
@given(st.text(max_size=200), st.text(max_size=200))
def test_whatever_stands_in_those_files(profiles: str, variables: str) -> None:
    loaded = confinement.profiles(profiles)
    found = list(confinement.judge_apparmor(loaded, variables, [Place("/x", "k", "VTORQUE_A")], "/usr/bin/qemu"))
    assert found
