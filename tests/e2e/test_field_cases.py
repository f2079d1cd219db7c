"""Scripts with inputs from the field: whatever they bring, no command ends in a defect.

    FIELD_CASES=FOLDER scripts/test tests/e2e/test_field_cases.py

runs each `NN-name/run.sh` of a folder against the installed command line, about fifteen minutes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("FIELD_CASES", "/nowhere")).absolute()
SCRIPTS = sorted(FOLDER.glob("*/run.sh"))


@pytest.mark.skipif(not SCRIPTS, reason="FIELD_CASES names no folder of field cases")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_no_input_from_the_field_is_a_defect(script, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "cases")
    copied = tmp_path / "cases" / script.relative_to(FOLDER)
    program = Path(sys.executable).with_name("lowrank-tune")
    done = subprocess.run(["bash", copied, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    said = done.stdout.decode(errors="replace")
    assert said
    for sign in ("defect of lowrank-tune", "Traceback (most recent call last)"):
        assert sign not in said, said[max(0, said.index(sign) - 3000) :][:6000]
