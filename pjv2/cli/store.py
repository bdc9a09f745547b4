"""`pjv2 store encrypt` and `pjv2 store decrypt`: stored events behind a key, or in the clear again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pjv2.cli.command import Cli
from pjv2.errors import NotNow, WrongUsage

if TYPE_CHECKING:
    from pjv2.backends.store.sealed import StoreKey
    from pjv2.config import Config

_NO_KEY = "no key is configured: set [store] encryption_key_file (a path) or encryption_keyring (a name)"


async def encrypt(
    cli: Cli,
    make_key: Annotated[
        bool, typer.Option("--make-key", help="First make the key where the configuration says that it is.")
    ] = False,
) -> None:
    """Encrypt the stored events that are still in the clear, with the configured key. It can be stopped and run again."""
    from pjv2.backends.store.sealed import encrypt_database

    config = cli.config
    if make_key:
        await _make_key(config)
        cli.out.say("The key was made. Keep a copy apart from this machine: without it the open sessions are lost.")
    key = await _key(config)
    _is_there(config)
    cli.resume = f"What was encrypted can be read with the key. Go on with: {cli.words('store', 'encrypt')}"
    done = await encrypt_database(config.store_url, key)
    cli.out.result(
        "StoreEncrypted",
        f"{done.changed} of {done.events} events were encrypted; the others were before. "
        "Backups and copies from before still hold them in the clear.",
        changed=done.changed,
        events=done.events,
    )


async def decrypt(cli: Cli) -> None:
    """Write the stored events in the clear again. It can be stopped and run again."""
    from pjv2.backends.store.sealed import decrypt_database

    config = cli.config
    key = await _key(config)
    _is_there(config)
    cli.resume = f"What was decrypted stays readable. Go on with: {cli.words('store', 'decrypt')}"
    done = await decrypt_database(config.store_url, key)
    cli.out.result(
        "StoreDecrypted",
        f"{done.changed} of {done.events} events were decrypted. Now take the key out of [store], or new events are encrypted.",
        changed=done.changed,
        events=done.events,
    )


async def _key(config: Config) -> StoreKey:
    from pjv2.opening import store_key

    key = await store_key(config)
    if key is None:
        raise WrongUsage(_NO_KEY)
    return key


def _is_there(config: Config) -> None:
    file = config.store_file
    if file is not None and not file.exists():
        raise WrongUsage(
            f"there is no database {file} yet; with a key configured, it is encrypted from its first event on"
        )


async def _make_key(config: Config) -> None:
    from pjv2.backends.store.sealed import new_key, put_key_in_keyring

    if config.store.encryption_keyring is not None:
        await put_key_in_keyring(config.store.encryption_keyring, new_key())
    elif config.store.encryption_key_file is not None:
        write_private(config.store.encryption_key_file, new_key() + "\n", "the key file")
    else:
        raise WrongUsage(_NO_KEY)


def write_private(path: Path, text: str, what: str) -> None:
    """Write a new file that only its owner can read, durably. Raises WrongUsage when it exists, NotNow."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise WrongUsage(f"{what} {path} exists, and is not written over") from exc
    except OSError as exc:
        raise NotNow(f"{what} {path} cannot be written: {exc.strerror or type(exc).__name__}") from exc
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise NotNow(f"{what} {path} cannot be written: {exc.strerror or type(exc).__name__}") from exc
