"""`make peers`: installs the real programs that pjv2 is tested against, outside the checkout.

    python -m tests.peers.install [--jobs N] [--show] [PEER ...]

What comes in: the machine's own apt configuration (for bitcoind, where PATH has none that is new enough) and cargo (for the
reference's programs, with the versions and the lock files that they were published with). What leaves: one directory per peer in the
cache (see tests/peers/peers.py), with a stamp that says what it is.

`bitcoind` comes from Debian unstable as the package bitcoin-knots. apt itself resolves and verifies it, with lists, archives and a
package database of its own, so that nothing of the system changes and nobody has to be root; it is never installed, only unpacked,
and runs with the loader and the libraries it was built for, which stand beside it. Which release that is cannot be pinned, because
unstable keeps one: the first that is installed stays, and the stamp lists its packages.

Law: a step is skipped when its stamp matches its recipe, writes under a temporary name and renames. What an interruption leaves is
picked up: cargo's objects, apt's archives. No archive is named here and no signature goes unchecked.

Exit codes: 0 everything is there; 4 something cannot be had on this machine now, each with its sentence; 2 no such peer.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.peers.peers import (
    NAMES,
    OLDEST_BITCOIND,
    STAMP,
    bitcoind_major,
    cache_directory,
    find,
    stamp_of,
    version_of,
)

MAILROOM, CLI = "0.1.3", "1.0.0"
OLDEST_RUST = (1, 85)
WRAPPER = Path(__file__).parent / "mailroom_tls"
HEARTBEAT = 30.0
ARCHIVE_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class CannotHave(Exception):
    """A peer cannot be had on this machine now. The text is the sentence for the person."""


@dataclass(frozen=True, slots=True)
class Step:
    """One peer: what it is made of, and how. `make` fills an empty directory and returns what the stamp is to say.

    Steps of the same `work` share a directory for what is between, which goes when the last of them is done.
    """

    name: str
    recipe: str
    work: str
    make: Callable[[Place], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step works: `part` becomes the peer's directory, `work` is what may be found again after an interruption."""

    name: str
    part: Path
    work: Path
    log: Path
    jobs: int


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- running other people's programs


def run(place: Place, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> str:
    """Runs a command with its output in the step's log, and a line now and then so that silence is not taken for death.

    Returns what it printed. Raises CannotHave, with the last lines, when it fails.
    """
    started = time.monotonic()
    with place.log.open("a+b") as log:
        log.write(f"$ {shlex.join(map(str, command))}\n".encode())
        log.flush()
        begin = log.tell()
        process: subprocess.Popen[bytes] | None = None
        try:
            with held_back():
                # A group of its own, so that what it starts in turn (cargo's compilers) ends with it.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "LC_ALL": "C", **(env or {})},
                    start_new_session=True,
                )
            while True:
                try:
                    code = process.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    minutes, seconds = divmod(int(time.monotonic() - started), 60)
                    say(f"  … {place.name}: {minutes} min {seconds:02} s, now: {last_line(place.log, begin)}")
        except BaseException:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            raise
    printed = text_from(place.log, begin)
    if code:
        tail = "\n".join(f"    {line}" for line in printed.splitlines()[-8:])
        raise CannotHave(f"`{Path(command[0]).name}` failed ({code}). Log: {place.log}\n{tail}")
    return printed


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Whoever stops us in here is heard at its end: a process that nobody knows of yet would be left behind."""
    heard: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: heard.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        signal.raise_signal(heard[0])


def text_from(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", "replace")


def last_line(log: Path, begin: int) -> str:
    lines = text_from(log, begin).split("\n")
    return next((line.strip()[:90] for line in reversed(lines) if line.strip()), "(nothing printed yet)")


def tool(name: str, why: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CannotHave(f"{why} needs `{name}`, which is not on PATH")
    return found


# ---------------------------------------------------------------- bitcoind, from Debian unstable


def make_bitcoind(place: Place) -> Mapping[str, Any]:
    system = release("ID") or sys.platform
    if system != "debian":
        raise CannotHave(
            f"no bitcoind {OLDEST_BITCOIND} or newer is on PATH, and one can only be fetched on Debian (this is {system}): install one"
        )
    apt, unpack = tool("apt-get", "fetching bitcoind"), tool("dpkg-deb", "unpacking bitcoind")
    tree = place.work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    archives = fetch_archives(place, apt)
    for archive in archives:
        run(place, [unpack, "-x", archive, tree])
    loader, libraries = needed_libraries(place, tree)
    (place.part / "bin").mkdir()
    (place.part / "lib").mkdir()
    for library in libraries:
        shutil.copy(library, place.part / "lib" / library.name)
    shutil.copy(loader, place.part / "lib" / "loader")
    shutil.copy(tree / "usr/bin/bitcoind", place.part / "lib" / "bitcoind")
    start = place.part / "bin" / "bitcoind"
    start.write_text(
        "#!/bin/sh\n"
        "# Runs with the loader and the libraries it was built for; exec, so that its pid is ours.\n"
        'lib=$(dirname "$(readlink -f "$0")")/../lib\n'
        'exec "$lib/loader" --library-path "$lib" "$lib/bitcoind" "$@"\n'
    )
    start.chmod(0o755)
    version = runs(start)
    if bitcoind_major(version) < OLDEST_BITCOIND:
        raise CannotHave(f"Debian unstable has {version!r}, which is older than {OLDEST_BITCOIND}")
    return {"version": version, "packages": {archive.name: sha256(archive) for archive in archives}}


def release(name: str) -> str:
    """A value of /etc/os-release; empty where there is none."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    match = re.search(rf'^{name}="?([^"\n]+)"?$', text, re.MULTILINE)
    return match[1] if match else ""


def fetch_archives(place: Place, apt: str) -> list[Path]:
    """bitcoin-knots of unstable and everything it depends on, as verified .deb files."""
    refused: list[str] = []
    for archive in archives_of_this_machine(place, apt):
        settings = apt_settings(place, archive)
        try:
            run(place, [apt, "-c", settings, "update", "--error-on=any"])
        except CannotHave as exc:
            refused.append(why_apt_refused(archive, str(exc)))
            continue
        say(f"  {place.name}: downloading bitcoin-knots and its libraries from {archive} unstable")
        install: list[str | Path] = [apt, "-c", settings, "--yes", "install", "bitcoin-knots"]
        chosen = re.findall(r"^Inst (\S+) \((\S+) .*\[(\S+)\]\)", run(place, [*install, "--simulate"]), re.MULTILINE)
        run(place, [*install, "--download-only"])
        archives = place.work / "cache" / "archives"
        # apt writes the colon of an epoch so in names of files.
        kept = [archives / f"{name}_{version.replace(':', '%3a')}_{kind}.deb" for name, version, kind in chosen]
        lost = [file.name for file in kept if not file.exists()]
        if lost or not any(file.name.startswith("bitcoin-knots_") for file in kept):
            raise CannotHave(f"apt chose packages and did not download them: {lost}. Log: {place.log}")
        return kept
    raise CannotHave("; ".join(refused) or "apt's configuration names no Debian archive")


def archives_of_this_machine(place: Place, apt: str) -> list[str]:
    """The archives that this machine's own configuration names for its own release, in its order."""
    lists = place.work / "own-lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    printed = run(place, [apt, "-o", f"Dir::State::lists={lists}", "update", "--print-uris"])
    names = {"unstable", "sid", "testing", "stable", release("VERSION_CODENAME")}
    found = re.findall(r"^'([^']+?)/*/dists/([^/']+)/InRelease'", printed, re.MULTILINE)
    return list(dict.fromkeys(archive for archive, suite in found if suite in names))


def apt_settings(place: Place, archive: str) -> Path:
    """An apt of our own: lists, archives and package database in the cache, one source, none of the machine's hooks and pins."""
    base = place.work
    for directory in ("lists/partial", "cache/archives/partial", "empty"):
        (base / directory).mkdir(parents=True, exist_ok=True)
    (base / "status").touch()
    signed_by = f"[signed-by={ARCHIVE_KEYRING}] " if ARCHIVE_KEYRING.exists() else ""
    (base / "sources.list").write_text(f"deb {signed_by}{archive} unstable main\n")
    settings = base / "apt.conf"
    settings.write_text(
        "#clear APT::Update;\n#clear DPkg;\n"
        f'Dir::State "{base}";\nDir::State::lists "{base}/lists";\nDir::State::status "{base}/status";\n'
        f'Dir::Cache "{base}/cache";\nDir::Etc::sourcelist "{base}/sources.list";\nDir::Etc::sourceparts "{base}/empty";\n'
        f'Dir::Etc::preferences "{base}/none";\nDir::Etc::preferencesparts "{base}/empty";\n'
        # The user that apt downloads as cannot read a cache in somebody's home.
        f'APT::Sandbox::User "{pwd.getpwuid(os.geteuid()).pw_name}";\n'
        'APT::Install-Recommends "false";\nAPT::Get::AllowUnauthenticated "false";\nAcquire::AllowInsecureRepositories "false";\n'
        'Acquire::Languages "none";\nAcquire::Retries "3";\n'
        'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";\n'
        'Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";\n'
    )
    return settings


def why_apt_refused(archive: str, told: str) -> str:
    if re.search(r"NO_PUBKEY|not signed|public key is not available|Missing key", told):
        return (
            f"{archive} unstable is signed by a key that this machine's archive keyring does not have: "
            "upgrade the package debian-archive-keyring"
        )
    return f"{archive} unstable: {told}"


def needed_libraries(place: Place, tree: Path) -> tuple[Path, list[Path]]:
    """The loader, and the libraries it finds for bitcoind; all of them must come out of the unpacked packages."""
    loaders = sorted(tree.glob("usr/lib*/**/ld-linux*.so.*")) + sorted(tree.glob("lib*/**/ld-linux*.so.*"))
    if not loaders:
        raise CannotHave(f"the unpacked libc6 holds no loader: {tree}")
    loader = loaders[0].resolve()
    where = {library.parent for library in tree.glob("usr/lib/**/*.so.*")} | {
        library.parent for library in tree.glob("lib/**/*.so.*")
    }
    path = ":".join(map(str, sorted(where)))
    told = run(place, [loader, "--library-path", path, "--list", tree / "usr/bin/bitcoind"])
    libraries: list[Path] = []
    for line in told.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow or name.startswith("/"):
            continue
        library = Path(rest.partition(" (")[0])
        if "not found" in rest or not library.is_relative_to(tree):
            raise CannotHave(f"bitcoind needs {name}, which none of its packages brings ({rest}). Log: {place.log}")
        libraries.append(library)
    if not any(library.name.startswith("libc.so") for library in libraries):
        raise CannotHave(f"the loader does not list bitcoind's libraries. Log: {place.log}")
    return loader, libraries


# ---------------------------------------------------------------- the reference's programs, by cargo


def make_crate(crate: str, version: str, features: str = "") -> Callable[[Place], Mapping[str, Any]]:
    def make(place: Place) -> Mapping[str, Any]:
        source = ["--version", version, crate, *(["--features", features] if features else [])]
        return cargo_install(place, source, f"{crate} {version}")

    return make


def make_wrapper(place: Place) -> Mapping[str, Any]:
    """Built with the very versions that payjoin-mailroom was published with: its lock file lies in the crate."""
    cargo = tool("cargo", f"{place.name} is built with Rust, which")
    source = place.work / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(WRAPPER, source)
    published = crate_directory(place, cargo, source, "payjoin-mailroom") / "Cargo.lock"
    shutil.copyfile(published, source / "Cargo.lock")
    resolve(place, cargo, source)  # adds the wrapper itself, and keeps every version that is locked
    if (locked := package_versions(published)) != (kept := package_versions(source / "Cargo.lock")):
        strange = sorted(f"{name} {version}" for name, version in kept - locked if name != place.name)
        if strange:
            raise CannotHave(f"{place.name} would be built with {', '.join(strange)}, which its reference was not")
    return cargo_install(place, ["--path", str(source)], f"payjoin-mailroom-tls {MAILROOM}")


def crate_directory(place: Place, cargo: str, source: Path, crate: str) -> Path:
    """Where cargo unpacked a dependency of `source`."""
    packages = json.loads(resolve(place, cargo, source))["packages"]
    return next(Path(package["manifest_path"]).parent for package in packages if package["name"] == crate)


def resolve(place: Place, cargo: str, source: Path) -> str:
    done = subprocess.run(
        [cargo, "metadata", "--format-version", "1", "--manifest-path", str(source / "Cargo.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotHave(f"cargo cannot resolve what {place.name} is made of: {done.stderr.strip()[-500:]}")
    return done.stdout


def package_versions(lock: Path) -> set[tuple[str, str]]:
    return {(package["name"], package["version"]) for package in tomllib.loads(lock.read_text())["package"]}


def cargo_install(place: Place, source: Sequence[str], told: str) -> Mapping[str, Any]:
    cargo = tool("cargo", f"{place.name} is built with Rust, which")
    printed = subprocess.run([cargo, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"cargo (\d+)\.(\d+)", printed)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_RUST:
        raise CannotHave(
            f"{place.name} needs cargo {OLDEST_RUST[0]}.{OLDEST_RUST[1]} or newer; this is {printed.strip() or 'none'}"
        )
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise CannotHave(f"{place.name} needs a C compiler (`cc`), which is not on PATH")
    say(f"  {place.name}: building with cargo, {place.jobs} at a time; minutes. Log: {place.log}")
    command = [cargo, "install", "--locked", "--jobs", str(place.jobs), "--root", str(place.part), *source]
    quiet = {"CARGO_TARGET_DIR": str(place.work), "CARGO_TERM_COLOR": "never", "CARGO_TERM_PROGRESS_WHEN": "never"}
    nice = shutil.which("nice")
    run(place, [nice, "-n", "19", *command] if nice else command, env=quiet)
    version = runs(place.part / "bin" / place.name)
    if version != told:
        raise CannotHave(f"cargo built {version!r} where {told!r} was asked for")
    return {"version": version, "sha256": sha256(place.part / "bin" / place.name)}


# ---------------------------------------------------------------- the plan


def plan() -> list[Step]:
    sources = [WRAPPER / name for name in ("Cargo.toml", "src/main.rs")]
    wrapper = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return [
        Step(
            "bitcoind",
            f"bitcoin-knots of Debian unstable, {OLDEST_BITCOIND} or newer, with its own loader",
            "apt",
            make_bitcoind,
        ),
        Step(
            "payjoin-mailroom",
            f"crate payjoin-mailroom {MAILROOM}, locked",
            "cargo",
            make_crate("payjoin-mailroom", MAILROOM),
        ),
        Step("payjoin-mailroom-tls", f"tests/peers/mailroom_tls {wrapper}, locked", "cargo", make_wrapper),
        # v2 is the default feature; with v1 the same program is also a BIP78 sender and receiver, chosen by --bip78.
        Step(
            "payjoin-cli",
            f"crate payjoin-cli {CLI}, v1 v2 _manual-tls, locked",
            "cargo",
            make_crate("payjoin-cli", CLI, "v1,_manual-tls"),
        ),
    ]


def there(step: Step, cache: Path) -> str:
    """What stands there already, if it is what the step would make; else empty."""
    if step.name == "bitcoind" and (peer := find("bitcoind")).path is not None and not peer.path.is_relative_to(cache):
        return f"{peer.path}: {peer.version}"
    stamp = stamp_of(cache / step.name)
    if stamp.get("recipe") != step.recipe or not os.access(cache / step.name / "bin" / step.name, os.X_OK):
        return ""
    return f"{cache / step.name}: {stamp.get('version')}"


def do(step: Step, cache: Path, jobs: int) -> str:
    """Makes one peer. Raises CannotHave; whatever happens, its directory is whole or not there."""
    final, part, old = cache / step.name, cache / f"{step.name}.part", cache / f"{step.name}.old"
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    work = cache / "work" / step.work
    log = cache / "logs" / f"{step.name}.log"
    for directory in (part, work, log.parent):
        directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log.write_bytes(b"")
    stamp = {**step.make(Place(step.name, part, work, log, jobs)), "recipe": step.recipe}
    (part / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
    if final.exists():
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return f"{stamp['version']}, {size(final)}, {time.monotonic() - started:.0f} s"


def runs(program: Path) -> str:
    version = version_of(program)
    if not version:
        raise CannotHave(f"{program} was installed, but `--version` does not run")
    return version


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 1e6:.0f} MB"


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """One installer at a time: a second one waits for the first."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another `make peers` is at work: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(names: Sequence[str], jobs: int) -> int:
    cache = cache_directory()
    steps = [step for step in plan() if step.name in (names or NAMES)]
    sentences: list[str] = []
    with alone(cache):
        say(f"peers go to {cache}")
        for step in steps:
            if standing := there(step, cache):
                say(f"{step.name}: there already, {standing}")
            else:
                say(f"{step.name}: {step.recipe}")
                try:
                    say(f"{step.name}: installed, {do(step, cache, jobs)}")
                except CannotHave as exc:
                    sentences.append(f"{step.name}: {exc}")
                    say(f"{step.name}: not installed")
            if all(there(other, cache) for other in plan() if other.work == step.work):
                shutil.rmtree(cache / "work" / step.work, ignore_errors=True)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 4 if sentences else 0


def show() -> int:
    for name in NAMES:
        peer = find(name)
        say(f"{name}: {f'{peer.path} ({peer.version})' if peer.path else peer.missing}")
    return 0 if all(find(name).path for name in NAMES) else 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.install", description=__doc__.partition("\n")[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"only these: {', '.join(NAMES)}")
    parser.add_argument("--jobs", type=int, default=2, help="how many compilers run at once")
    parser.add_argument("--show", action="store_true", help="only say what is there")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.peers if name not in NAMES]:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if given.show:
        return show()
    # Whoever stops us stops the compiler too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return install(given.peers, given.jobs)
    except KeyboardInterrupt:
        print("interrupted; make peers picks up where it stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
