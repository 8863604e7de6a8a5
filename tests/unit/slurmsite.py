"""A site on Slurm: stub `sbatch` and `srun` that record how they were called, and answer as told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Optional

from vsubsite import Site

ENVIRONMENT = '\nenv -0 >"{record}/environment"\n'


class SlurmSite:
    """A `Site` whose batch system is Slurm."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.bin = site.base / "bin"
        self.bin.mkdir()
        for name in ("sbatch", "srun"):
            shutil.copy(site.qsub, self.bin / name)
            with (self.bin / name).open("r+") as stream:
                text = stream.read()
                stream.seek(0)
                stream.write(text.replace("#!/bin/sh\n", "#!/bin/sh" + ENVIRONMENT.format(record=site.record), 1))
        self.program("scontrol", "echo 'ClusterName             = ref'")
        self.configure()
        site.answer(stdout="12\n")

    def configure(self, submit: str = "", policy: str = "", more: str = "") -> None:
        text = f"policy: {{img: {{default: micro}}, vcpus: {{max: 8}}, ram: {{max: 4G}}, nodes: {{max: 8}}{policy}}}\n"
        self.site.configure(text + more, submit=submit)
        config = self.site.install.config
        config.write_text(f"engine: slurm\nslurm: {{bin: {self.bin}}}\n{config.read_text()}")

    def program(self, name: str, body: str) -> Path:
        """A stub of another of Slurm's programs, which records how it was called."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "$@" >>"{self.site.record}/{name}"\n{body}\n')
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[str]:
        path = self.site.record / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def asked(self) -> dict[str, Optional[str]]:
        """The options that sbatch, or srun, was given; each is one word."""
        words = self.site.argv[:-1]
        assert all(word.startswith("--") for word in words), words
        pairs = [word[2:].partition("=") for word in words]
        return {name: value if equals else None for name, equals, value in pairs}

    @property
    def environment(self) -> dict[str, str]:
        """The environment that sbatch, or srun, was given."""
        items = os.fsdecode((self.site.record / "environment").read_bytes()).split("\0")[:-1]
        pairs = [item.partition("=") for item in items]
        return {name: value for name, _, value in pairs if name not in ("PWD", "_", "SHLVL", "OLDPWD")}


def explained(text: str) -> dict[str, tuple[str, str]]:
    """Value and source of each key, from `--explain --json`."""
    values = json.loads(text)["values"]
    return {key: (found["value"], found["source"]) for key, found in values.items()}
