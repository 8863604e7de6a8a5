"""What quickstart.sh announces on a machine without images: it reads the recipes without any YAML library."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from nodesite import REPOSITORY

TEXT = (REPOSITORY / "quickstart.sh").read_text()


@pytest.mark.parametrize("key", ["download_mb", "build_disk_mb"])
@pytest.mark.parametrize("image", re.findall(r"^images='(.*)'$", TEXT, re.MULTILINE)[0].split())
def test_the_figures_of_a_recipe_are_found(image: str, key: str) -> None:
    function = re.search(r"^recipe_number\(\) \{.*?^\}$", TEXT, re.MULTILINE | re.DOTALL)
    assert function is not None
    code = f'set -eu; here="$1"; {function[0]}\necho $((1000 + $(recipe_number "$2" "$3")))'
    done = subprocess.run(["sh", "-c", code, "sh", str(REPOSITORY), image, key], capture_output=True, text=True)
    recipe = yaml.safe_load((REPOSITORY / "contrib" / "images" / image / "recipe.yaml").read_text())
    assert (done.stdout, done.stderr) == (f"{1000 + recipe[key]}\n", "")
