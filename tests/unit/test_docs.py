"""The documents say what is: their code runs, their links lead somewhere, their drawn parts are what the code says."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from pjv2.cli.app import COMMANDS, run
from pjv2.cli.command import Cli
from tests import docs_generator, docs_reference

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
SPEC_MAP = ROOT / "docs" / "spec-map.md"
ATTACKS = ROOT / "docs" / "attacks.md"
DOCUMENTS = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "relay_config" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
MODULE = re.compile(r"`(?P<path>pjv2/[\w/]+\.py)`")
NODE = re.compile(r"`(?P<file>[\w/]+\.py)::(?P<test>\w+)`")
FUNCTION_ROW = re.compile(r"^\| [^|]+ \| (?P<functions>[^|]+) \| [^|]+ \|$", re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [match["text"] for match in FENCE.finditer(text(path)) if match["language"] == language]


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives to headings."""
    prose = FENCE.sub("", text(path))
    found = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def at_home(tmp_path: Path) -> dict[str, str]:
    """An environment without any configuration or data of whoever runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PJV2_", "XDG_", "COV_"))}
    return kept | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


# ---------------------------------------------------------------- drawn parts


def test_the_drawn_parts_of_flow_md_are_what_the_code_says() -> None:
    stands = text(docs_generator.FLOW)
    assert stands == docs_generator.generate(stands), "run make docs"


def test_a_changed_table_is_noticed_and_the_hand_written_frame_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands = text(docs_generator.FLOW)
    copy = tmp_path / "flow.md"
    copy.write_text(stands.replace("| `Initialized` | `OriginalReceived`", "| `Initialized` | `Nonsense`"))
    monkeypatch.setattr(docs_generator, "FLOW", copy)
    monkeypatch.setattr(docs_reference, "documents", dict)
    assert docs_generator.main(["--check"]) == 1
    assert docs_generator.main(["--write"]) == 0
    assert copy.read_text(encoding="utf-8") == stands
    assert docs_generator.main(["--check"]) == 0


@pytest.mark.parametrize("table", ["RECEIVER_STATES", "SENDER_STATES", "EFFECTS", "MEANINGS"])
def test_a_name_that_the_code_does_not_have_is_refused(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_generator, table, {**getattr(docs_generator, table), "Nonsense": ((), ())})
    with pytest.raises(docs_generator.StaleTables, match="in vain"):
        docs_generator.parts()


def test_every_event_of_an_effect_is_announced_or_reported_once() -> None:
    effects = dict(docs_generator.EFFECTS)
    # An Original goes one of two ways, into a mailbox or to the payee's own server; one event announces both.
    assert effects.pop("PostBip78")[0] == effects["PostOriginal"][0]
    named = [event for before, after in effects.values() for event in (*before, *after)]
    assert len(named) == len(set(named))


@pytest.mark.parametrize("path", docs_reference.documents(), ids=name)
def test_the_reference_is_what_the_code_says(path: Path) -> None:
    assert text(path) == docs_reference.documents()[path], "run make docs"


def test_a_reference_that_is_missing_or_changed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs_reference, "FOLDER", tmp_path / "reference")
    monkeypatch.setattr(docs_generator, "generate", lambda stands: stands)
    assert docs_generator.main(["--check"]) == 1
    assert docs_generator.main(["--write"]) == 0
    assert docs_generator.main(["--check"]) == 0
    (tmp_path / "reference" / "config.md").write_text("nonsense", encoding="utf-8")
    assert docs_generator.main(["--check"]) == 1


def test_the_reference_is_the_same_on_every_machine(tmp_path: Path) -> None:
    code = "from tests.docs_reference import documents; print(*documents().values(), sep='', end='')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=at_home(tmp_path) | {"COLUMNS": "20", "NO_COLOR": "1", "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
        check=False,
    )
    assert done.stdout == "".join(docs_reference.documents().values()), done.stderr


@pytest.mark.parametrize("known", ["KEYS", "FIELDS"])
def test_a_key_or_field_that_the_code_does_not_have_is_refused(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_reference, known, {**getattr(docs_reference, known), "nonsense": ("", "")})
    with pytest.raises(docs_reference.StaleTables, match="in vain"):
        docs_reference.documents()


# ---------------------------------------------------------------- what is executed


def test_the_example_of_the_readme_is_paid(tmp_path: Path) -> None:
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 25
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=at_home(tmp_path),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "Paid\n"), done.stderr
    assert "It prints `Paid`." in text(README)


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    lines = [line for block in blocks(README, "console") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *words = shlex.split(line.removeprefix("$ "))
        assert program == "pjv2"
        done = subprocess.run(
            [sys.executable, "-m", "pjv2.cli", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=at_home(tmp_path),
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"


GUIDES = [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
HARMLESS = {"history", "export", "plan list", "completion"}
"""Commands that only look, and need neither configuration nor network."""


def commands_in(path: Path) -> list[list[str]]:
    """The words of every `$ pjv2` line of a document's consoles."""
    lines = [line for block in blocks(path, "console") for line in block.splitlines() if line.startswith("$ pjv2 ")]
    return [shlex.split(line.removeprefix("$ ").partition(" > ")[0])[1:] for line in lines]


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """A command's name and what follows it, without global options before it."""
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] == "--config" else words[1:]
    found = " ".join(words[:2])
    return (found, words[2:]) if found in COMMANDS else (words[0], words[1:])


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_the_commands_and_options_of_a_guide_exist(guide: Path) -> None:
    named = [command_of(words) for words in commands_in(guide)]
    assert named
    for command, rest in named:
        assert command in COMMANDS
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= docs_reference.options(command)


@pytest.mark.parametrize("guide", GUIDES[1:], ids=name)
def test_the_code_of_a_guide_names_what_exists(guide: Path) -> None:
    for block in blocks(guide, "python"):
        found: dict[str, object] = {}
        # Our own document: it defines functions, and calls none.
        exec(compile(block, name(guide), "exec"), found)
        assert all(
            isinstance(node, ast.Import | ast.ImportFrom | ast.AsyncFunctionDef) for node in ast.parse(block).body
        )
        for called in ast.walk(ast.parse(block)):
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "desk":
                assert hasattr(found["Payjoin"], called.attr)


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_the_harmless_commands_of_a_guide_run_where_nothing_is(
    guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [key for key in os.environ if key.startswith("PJV2_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr("pjv2.config.default_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path / "data")
    for words in commands_in(guide):
        if command_of(words)[0] in HARMLESS and "--config" not in words:
            assert run(words, cli=Cli(stdout=io.StringIO(), stderr=io.StringIO())) == 0, words


QUICK = """\
import functools, sys
from pjv2.app import Payjoin
from pjv2.cli.app import run
from pjv2.cli.command import Cli
from pjv2.driver import Pace
sys.exit(run(cli=Cli(opened=functools.partial(Payjoin.open, pace=Pace(watch=0.3)))))
"""
"""The shell, looking at the chain more often than every half minute."""


@pytest.mark.skipif(find_spec("bdkpython") is None, reason="the tutorial's wallets are embedded ones")
async def test_the_tutorial_pays(tmp_path: Path) -> None:
    tutorial = ROOT / "docs" / "tutorial.md"
    (script,) = blocks(tutorial, "python")
    (tmp_path / "lab.py").write_text(script, encoding="utf-8")
    home = at_home(tmp_path) | {"XDG_DATA_HOME": str(tmp_path / "data"), "COLUMNS": "400"}

    async def start(*words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=-1, stderr=-1, cwd=tmp_path, env=home, limit=1 << 20
        )

    async def line(process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            return (await process.stdout.readline()).decode().strip()

    async def ended(process: asyncio.subprocess.Process) -> str:
        async with asyncio.timeout(90):
            out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    doctor, receive, send, *looks = commands_in(tutorial)
    lab = await start("lab.py")
    try:
        peer = (await line(lab)).removeprefix("The lab is up. A Lightning peer: ")
        told = await ended(await start("-c", QUICK, *doctor))
        assert "failed." in told
        receiving = await start("-c", QUICK, *(word.replace("PEER", peer) for word in receive))
        uri = await line(receiving)
        assert uri.startswith("bitcoin:")
        await ended(await start("-c", QUICK, *(word.replace("URI", uri) for word in send)))
        assert "payjoin" in await ended(receiving)

        async def look(person: str) -> str:
            """Everything that the page lets this person look at, in its order; answers the last output."""
            told = ""
            for shown in [words for words in looks if person in words]:
                words = shown
                if "ID" in shown:
                    rows = await ended(await start("-c", QUICK, "--config", person, "--json", "history"))
                    words = [json.loads(rows)["session"][:8] if word == "ID" else word for word in shown]
                told = await ended(await start("-c", QUICK, *words))
            return told

        told, _ = await asyncio.gather(look("bob.toml"), look("alice.toml"))
        assert told.startswith("session,role")
        async with asyncio.timeout(60):
            while ",Paid," not in told:
                await ended(await start("-c", QUICK, "--config", "bob.toml", "resume"))
                told = await ended(await start("-c", QUICK, "--config", "bob.toml", "export"))
        assert "=100000" in told
    finally:
        lab.terminate()
        await lab.communicate()


def test_the_readme_tells_every_command_there_is_and_no_other_as_working() -> None:
    told = re.findall(r"^\| `pjv2 ([a-z ]+?)(?: ID)?` \|", text(README), re.MULTILINE)
    assert set(told) == set(COMMANDS)
    missing = re.search(r"^- the commands (.+?);$", text(README), re.MULTILINE)
    assert missing is None or not set(re.findall(r"`(\w+)`", missing[1])) & set(COMMANDS)


def test_the_targets_of_make_that_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)(?:PYTHON=\S+ )?make ([a-z]+)", text(document), re.MULTILINE))
        assert named <= targets, name(document)


def test_the_pythons_of_the_readme_are_those_of_the_package() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "Python 3.11, 3.12 or 3.13" in text(README)


# ---------------------------------------------------------------- what must exist


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    for match in LINK.finditer(FENCE.sub("", text(document))):
        target, _, fragment = match["target"].partition("#")
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        there = (document.parent / target).resolve() if target else document
        assert there.is_relative_to(ROOT), f"{match['target']} leads out of the repository"
        assert there.exists(), f"{match['target']} leads nowhere"
        if fragment:
            assert fragment in anchors(there), f"{match['target']} names no heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_path_of_a_machine_stands_in_a_document(document: Path) -> None:
    found = re.findall(
        r"(?<![\w:/.])(?:/(?:work|home|root|tmp|Users|opt|mnt|var)/\S*|[A-Z]:\\\S+|~/\S+)", text(document)
    )
    assert not found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_of_the_package_that_a_document_names_exist(document: Path) -> None:
    for match in MODULE.finditer(text(document)):
        assert (ROOT / match["path"]).is_file(), match["path"]


@pytest.mark.parametrize(("document", "least"), [(SPEC_MAP, 50), (ATTACKS, 50)], ids=["spec-map", "attacks"])
def test_every_test_that_a_map_names_exists(document: Path, least: int) -> None:
    nodes = list(NODE.finditer(text(document)))
    assert len(nodes) > least
    known: dict[str, set[str]] = {}
    for match in nodes:
        path = ROOT / "tests" / match["file"]
        assert path.is_file(), match["file"]
        if match["file"] not in known:
            tree = ast.parse(text(path))
            known[match["file"]] = {
                node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        assert match["test"] in known[match["file"]], f"{match['file']} has no {match['test']}"


def test_every_claim_that_an_attacker_cannot_do_something_names_a_test() -> None:
    tables = re.findall(
        r"^\| (\w+) cannot \| because \| shown by \|\n(.+?)(?=\n\n|\Z)", text(ATTACKS), re.MULTILINE | re.DOTALL
    )
    assert len(tables) == 7
    for _, table in tables:
        rows = table.splitlines()[1:]
        assert rows
        for row in rows:
            assert NODE.search(row.rsplit(" | ", 1)[1]), row


@pytest.mark.parametrize("module", ["pjv2/psbt/original.py", "pjv2/psbt/verify.py"])
def test_the_checklists_of_the_spec_map_name_functions_that_exist(module: str) -> None:
    head, _, rows = text(SPEC_MAP).partition(f"| function in `{module}` |")
    assert head != text(SPEC_MAP)
    table = rows.partition("\n\n")[0]
    named = {one for row in FUNCTION_ROW.finditer(table) for one in re.findall(r"`(\w+)`", row["functions"])}
    named -= {"OriginalAccepted"}
    defined = {node.name for node in ast.parse(text(ROOT / module)).body if isinstance(node, ast.FunctionDef)}
    assert named
    assert named <= defined


def test_the_index_of_the_documents_names_them_all() -> None:
    index = {match["target"] for match in LINK.finditer(text(ROOT / "docs" / "README.md"))}
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert there <= index


def test_the_changelog_has_an_entry_for_this_version() -> None:
    version = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["version"]
    entry = re.search(
        rf"^## {re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", text(ROOT / "CHANGELOG.md"), re.MULTILINE | re.DOTALL
    )
    assert entry is not None
    assert "\n- " in entry[1]
    assert f"Version {version}" in text(README)
