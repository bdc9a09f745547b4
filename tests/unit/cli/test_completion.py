"""Completion: each shell's script is printed, is read by that shell where it is here, and completing loads nothing heavy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from pjv2.cli.app import COMMANDS, run

SHELLS = ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_printed_and_read_by_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_PJV2_COMPLETE=complete_" + shell in script
    assert run(["--json", "completion", shell]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["shell"], line["script"].strip()) == ("Completion", shell, script.strip())
    if there := shutil.which(shell):
        done = subprocess.run([there, "-n"], input=script, text=True, capture_output=True, check=False, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_that_is_not_known_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err


def completed(words: str, number: int) -> list[str]:
    told = {**os.environ, "_PJV2_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = subprocess.run(
        [sys.executable, "-m", "pjv2.cli"], env=told, text=True, capture_output=True, check=True, timeout=30
    )
    return done.stdout.split()


def test_commands_options_and_choices_are_completed() -> None:
    assert set(completed("pjv2 ", 1)) == {words.split()[0] for words in COMMANDS}
    assert completed("pjv2 hist", 1) == ["history"]
    assert completed("pjv2 store ", 2) == ["encrypt", "decrypt"]
    assert "--format" in completed("pjv2 export --f", 2)
    assert completed("pjv2 export --format b", 3) == ["bip329"]


def test_completing_imports_no_wallet_database_or_network() -> None:
    probe = (
        "import os, sys\n"
        "os.environ.update(_PJV2_COMPLETE='complete_bash', COMP_WORDS='pjv2 hi', COMP_CWORD='1')\n"
        "from pjv2.cli import main\n"
        "try:\n    main([])\nexcept SystemExit:\n    pass\n"
        "heavy = {'sqlalchemy', 'httpx', 'rich', 'bitcointx', 'nacl', 'pjv2.config'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], text=True, capture_output=True, check=True, timeout=30)
    assert done.stdout.split() == ["history"]
    assert done.stderr.splitlines()[-1] == "heavy: []"
