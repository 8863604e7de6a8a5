"""The way of images of Red Hat's family, with RPM packages of our own: from a repository to a guest that boots.

The packages are small; one of them carries kernel and modules of the image debian-12.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from guestsetup import POOL

from vmgr.errors import Code, VTorqueError
from vmgr.images.build import build
from vmgr.images.pool import Image, Pool

pytestmark = [pytest.mark.guest, pytest.mark.root]

INIT = """\
#!/bin/sh
# the guest's first program
mount -t proc proc /proc
echo "rpm guest: $(cat /etc/motd) $(cat /etc/installed) $(uname -r)" >/dev/console
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
"""
INSTALLED = """\
echo "links $(ls /proc/self/net/dev_snmp6)" >/etc/installed
echo nothing >/dev/null || echo "no device" >>/etc/installed
"""
SPEC = """\
Name: {name}
Version: {version}
Release: 1
Summary: for a test
License: none
AutoReqProv: no
{head}
%global _binary_payload w0.gzdio
%global __os_install_post %{{nil}}
%global debug_package %{{nil}}
%description
For a test.
%install
mkdir -p %{{buildroot}}
cp -a {tree}/. %{{buildroot}}/
{post}
%files
{files}
"""


class Repository:
    """A folder of RPM packages that are made here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"
        self.packages.mkdir(parents=True)

    @property
    def url(self) -> str:
        return f"file://{self.packages}"

    def add(self, name: str, tree: Path, *, version: str = "1", head: str = "", post: str = "") -> None:
        """A package of what lies in `tree`; `head` and `post` are lines of its spec file."""
        files = [f"/{path.relative_to(tree)}" for path in tree.rglob("*") if path.is_symlink() or not path.is_dir()]
        spec = self.folder / f"{name}.spec"
        spec.write_text(
            SPEC.format(name=name, version=version, head=head, tree=tree, post=post, files="\n".join(files))
        )
        command = ["rpmbuild", "-bb", "--quiet", "--define", f"_topdir {self.folder}/top", "--target", "x86_64"]
        subprocess.run([*command, str(spec)], check=True, capture_output=True)
        (built,) = (self.folder / "top/RPMS").rglob(f"{name}-{version}-*.rpm")
        built.rename(self.packages / built.name)
        subprocess.run(["createrepo_c", "--quiet", str(self.packages)], check=True, capture_output=True)


def debian_kernel(folder: Path, tree: Path) -> None:
    """Kernel and modules of the image debian-12, in the places where a distribution with RPM packages has them."""
    image = Pool(POOL).get("debian-12")
    start = folder / "start.raw"
    subprocess.run(
        ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=64", f"if={image.path('disk')}", f"of={start}"],
        check=True,
    )
    modules = tree / "lib/modules/6.1-rpm"
    modules.mkdir(parents=True)
    subprocess.run(["mcopy", "-i", f"{start}@@1M", "::vmlinuz", str(modules / "vmlinuz")], check=True)
    initrd = folder / "initrd"
    initrd.mkdir()
    with image.path("initrd").open("rb") as stream:
        subprocess.run(["busybox", "cpio", "-id"], cwd=initrd, stdin=stream, check=True, capture_output=True)
    for module in (initrd / "lib/modules").glob("*.ko"):
        module.rename(modules / module.name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("rpm")
    made = Repository(folder / "repository")
    kernel = folder / "kernel"
    debian_kernel(folder, kernel)
    made.add("kernel", kernel)
    base = folder / "base"
    (base / "bin").mkdir(parents=True)
    (base / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (base / "bin/busybox").chmod(0o755)
    for name in ("sh", "mount", "cat", "uname", "sleep", "ls"):
        (base / "bin" / name).symlink_to("busybox")
    made.add("tiny-base", base, head="Provides: /bin/sh")
    system = folder / "system"
    (system / "sbin").mkdir(parents=True)
    (system / "sbin/init").write_text(INIT)
    (system / "sbin/init").chmod(0o755)
    (system / "etc").mkdir()
    (system / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    made.add("tiny-system", system, head="Requires: tiny-base\nRequires(post): tiny-base", post=f"%post\n{INSTALLED}")
    return made


def recipe(folder: Path, repository: Repository, **changes: Any) -> Path:
    home = folder / "tiny-rpm"
    home.mkdir(exist_ok=True)
    (home / "motd").write_text("hello")
    (home / "finish").write_text("#!/bin/sh\necho finished >>/etc/installed\n")
    rocky = Path(__file__).resolve().parents[2] / "contrib/images/rocky-9/initrd/init"
    (home / "initrd").mkdir(exist_ok=True)
    (home / "initrd/init").write_text(rocky.read_text())
    (home / "initrd/init").chmod(0o755)
    data = {
        "version": 1, "name": "tiny-rpm", "kind": "dnf", "family": "redhat", "distro": "SLG", "arch": "amd64",
        "release": "9", "description": "for a test", "download_mb": 20, "disk_mb": 80, "build_disk_mb": 200,
        "disk_mib": 160, "cmdline": "root=LABEL=vtorque-root rw console=ttyS0 quiet panic=-1 no_timer_check",
        "min_ram_mib": 256, "features": ["virtiofs"], "kernel": "kernel", "packages": ["tiny-system"],
        "repositories": [{"name": "ours", "url": repository.url}],
        "modules": ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"], "initrd": "initrd",
        "files": [{"source": "motd", "target": "/etc/motd"}], "scripts": ["finish"],
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump({**data, **changes}))
    return home


def make(home: Path, pool: Pool) -> tuple[Image, list[str]]:
    said: list[str] = []
    return build(str(home), recipes=[], pool=pool, progress=said.append), said


@pytest.fixture(scope="module")
def built(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pool, Image]]:
    folder = tmp_path_factory.mktemp("built")
    home, pool = recipe(folder, repository), Pool(folder / "pool")
    image, _ = make(home, pool)
    yield home, pool, image


def test_the_image_has_the_packages_and_boots(built: tuple[Path, Pool, Image]) -> None:
    _, _, image = built
    assert (image.family, image.virtual_size) == ("redhat", 160 << 20)
    assert image.path("packages").read_text() == "kernel 1-1 x86_64\ntiny-base 1-1 x86_64\ntiny-system 1-1 x86_64\n"
    done = subprocess.run(
        [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-serial", "stdio",
            "-kernel", str(image.path("kernel")), "-initrd", str(image.path("initrd")), "-append", image.cmdline,
            "-drive", f"file={image.path('disk')},format=qcow2,if=none,id=disk,snapshot=on",
            "-device", "virtio-blk-pci,drive=disk",
        ],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert "rpm guest: hello links lo finished 6." in " ".join(done.stdout.split()), done.stdout + done.stderr


@pytest.mark.slow
def test_the_same_is_not_built_twice_and_a_new_package_makes_a_revision(
    built: tuple[Path, Pool, Image], repository: Repository, tmp_path: Path
) -> None:
    home, pool, image = built
    again, said = make(home, pool)
    assert again.revision == image.revision and "nothing has changed since revision 1" in said[-1]
    more = tmp_path / "more"
    (more / "etc").mkdir(parents=True)
    (more / "etc/more").write_text("more")
    repository.add("tiny-base-more", more)
    assert make(home, pool)[0].revision == image.revision
    repository.add("tiny-system", more, version="2", head="Requires: tiny-base")
    newer, _ = make(home, pool)
    assert newer.revision == image.revision + 1
    assert "tiny-system 2-1 x86_64" in newer.path("packages").read_text()


@pytest.mark.slow
def test_only_packages_that_are_signed_with_the_repositorys_key_are_installed(
    repository: Repository, tmp_path: Path
) -> None:
    home, packages = tmp_path / "gnupg", tmp_path / "packages"
    home.mkdir(mode=0o700)
    shutil.copytree(repository.packages, packages)
    environment = {**os.environ, "GNUPGHOME": str(home)}

    def gpg(*command: str) -> bytes:
        done = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    gpg("gpg", "--batch", "--quiet", "--passphrase", "", "--quick-gen-key", "nobody@example.org", "rsa2048")
    (tmp_path / "key").write_bytes(gpg("gpg", "--armor", "--export"))
    signed = {"name": "ours", "url": f"file://{packages}", "gpgkey": f"file://{tmp_path}/key"}
    pool = Pool(tmp_path / "pool")
    with pytest.raises(VTorqueError, match="not signed") as caught:
        make(recipe(tmp_path, repository, repositories=[signed]), pool)
    assert caught.value.code is Code.BUILD and pool.names() == []
    names = ("--define", "_gpg_name nobody@example.org", "--define", "__gpg /usr/bin/gpg")
    gpg("rpmsign", *names, "--addsign", *map(str, packages.glob("*.rpm")))
    gpg("gpgconf", "--kill", "all")
    gpg("createrepo_c", "--quiet", str(packages))
    image, _ = make(recipe(tmp_path, repository, repositories=[signed]), pool)
    assert "gpg-pubkey" not in image.path("packages").read_text() and image.revision == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages": ["no-such-package"]}, "no-such-package"),
        ({"repositories": [{"name": "gone", "url": "file:///nowhere/at/all"}]}, "gone"),
    ],
)
def test_what_cannot_be_installed_is_named(
    repository: Repository, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pool = Pool(tmp_path / "pool")
    with pytest.raises(VTorqueError, match=message) as caught:
        make(recipe(tmp_path, repository, **changes), pool)
    assert caught.value.code is Code.BUILD and pool.names() == []
