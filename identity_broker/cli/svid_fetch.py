"""What `idb svid fetch` does: obtain an identity, write it, tell others, and follow it.

- Files are replaced before the hook runs, and the hook runs after every complete replacement.
- A failing hook or a full disk is told and, while watching, does not end the watch: what is on
  disk stays, and a disk that could not be written to is tried again.
- The OCSP answer to staple is written together with its SVID, and again when there is a newer one.
  Asking for it may delay the files by a few seconds, and never prevents them.
- Nothing secret is printed: keys go into --write's directory or nowhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from identity_broker.cli.errors import FileUnusable, HookFailed, UsageRefused
from identity_broker.cli.output import OutputFormat, distance, emit, say, to_document
from identity_broker.cli.svid_staple import Stapler
from identity_broker.cli.svid_writer import SvidFile, SvidFolder, svid_files
from identity_broker.domain.clock import SystemClock
from identity_client.aio import IdentitySource
from identity_client.credential import IdentitySnapshot
from identity_client.errors import RequestRejected, SourceError
from identity_client.settings import SourceSettings
from identity_client.workload_api.settings import WorkloadApiSettings

_HOOK_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_WRITE_AGAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What is done with an identity.

    Attributes:
        write: the directory its files go to; None for none.
        hook: the program to run after that, and its arguments; empty for none.
        watch: go on with every new one, until stopped.
        timeout: seconds to wait for the first one; None waits for ever.
    """

    output: OutputFormat
    write: Path | None
    hook: tuple[str, ...]
    watch: bool
    timeout: float | None


def parse_hook(command: str | None, *, write: Path | None) -> tuple[str, ...]:
    """The words of --exec; no shell looks at them.

    Raises:
        UsageRefused: they cannot be told apart, or name no program.
    """
    if command is None:
        return ()
    if write is None:
        raise UsageRefused(
            "--exec runs after files were replaced", hint="say where to write them: --write DIR"
        )
    try:
        words = tuple(shlex.split(command))
    except ValueError as exc:
        raise UsageRefused(f"--exec cannot be read: {exc}") from exc
    if not words or shutil.which(words[0]) is None:
        raise UsageRefused(
            f'--exec names no program that is there: "{words[0] if words else ""}"',
            hint="no shell runs it; write --exec \"sh -c '…'\" where you need one",
        )
    return words


def fetch(settings: SourceSettings | WorkloadApiSettings, delivery: Delivery) -> None:
    """Obtain the identity and deliver it; with `watch`, until SIGTERM or SIGINT.

    Raises:
        IdentityError: there is none to be had.
        FileUnusable, HookFailed: it could not be delivered (not while watching).
    """
    # The source's own log would be a second voice beside what is told here.
    logging.getLogger("identity_client").addHandler(logging.NullHandler())
    with ExitStack() as stack:
        folder = stack.enter_context(SvidFolder(delivery.write)) if delivery.write else None
        asyncio.run(_run(IdentitySource(settings), _Deliverer(delivery, folder)))


async def _run(source: IdentitySource, deliverer: _Deliverer) -> None:
    delivery = deliverer.delivery
    async with source:
        if not delivery.watch:
            await source.wait_ready(delivery.timeout)
            await deliverer.deliver(source)
            return
        following = asyncio.create_task(_follow(source, deliverer))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, following.cancel)
        with suppress(asyncio.CancelledError):
            await following


async def _follow(source: IdentitySource, deliverer: _Deliverer) -> None:
    tasks = [
        asyncio.create_task(work)
        for work in (
            _deliver_all(source, deliverer),
            _keep_stapling(source, deliverer),
            _end_when_hopeless(source),
            _tell_trouble(source),
        )
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _deliver_all(source: IdentitySource, deliverer: _Deliverer) -> None:
    await source.wait_ready(deliverer.delivery.timeout)
    async for _ in source.updates(crls=True):
        await _deliver_now(source, deliverer)


async def _keep_stapling(source: IdentitySource, deliverer: _Deliverer) -> None:
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        if deliverer.is_staple_due():
            await _deliver_now(source, deliverer)


async def _deliver_now(source: IdentitySource, deliverer: _Deliverer) -> None:
    while True:
        try:
            await deliverer.deliver(source)
        except FileUnusable as error:
            say(f"{error}; trying again")
            await asyncio.sleep(_WRITE_AGAIN_SECONDS)
            continue
        except HookFailed as error:
            say(str(error))
        except SourceError:
            pass  # There was none yet; what comes is delivered.
        break


async def _tell_trouble(source: IdentitySource) -> None:
    told = ""
    while True:
        status = source.status()
        error = status.last_error
        news = f"{status.state}: {error.reason}" if error else str(status.state)
        if news != told and error is not None:
            say(f"{status.state}: {error}")
        elif news != told and told:
            say(f"{status.state}")
        told = news
        await asyncio.sleep(_LOOK_SECONDS)


async def _end_when_hopeless(source: IdentitySource) -> None:
    while True:
        status = source.status()
        if isinstance(status.last_error, RequestRejected) and not status.ready:
            raise status.last_error
        await asyncio.sleep(_LOOK_SECONDS)


class _Deliverer:
    """Writes, runs the hook, prints."""

    def __init__(self, delivery: Delivery, folder: SvidFolder | None) -> None:
        self.delivery = delivery
        self._folder = folder
        self._stapler = None if folder is None else Stapler()
        self._delivering = asyncio.Lock()
        self._latest: tuple[IdentitySnapshot, tuple[bytes, ...]] | None = None
        self._delivered: dict[str, SvidFile] = {}

    def is_staple_due(self) -> bool:
        """Whether there should be a newer OCSP answer by now."""
        return self._stapler is not None and self._stapler.is_due()

    async def deliver(self, source: IdentitySource) -> None:
        """Deliver what the source holds now, unless no file would differ.

        Of an identity that was withdrawn the files stay, and its OCSP answer is kept current.

        Raises:
            FileUnusable, HookFailed.
            SourceError: it holds nothing, and never did.
        """
        async with self._delivering:
            try:
                self._latest = (source.snapshot(), source.crls)
            except SourceError:
                if self._latest is None:
                    raise
            await self._deliver(*self._latest)

    async def _deliver(self, snapshot: IdentitySnapshot, crls: tuple[bytes, ...]) -> None:
        staple = None if self._stapler is None else await self._stapler.answer(snapshot)
        wanted = svid_files(snapshot, crls, staple)
        if wanted == self._delivered:
            return  # The keys of JWT-SVIDs have changed: no file has any.
        files: dict[str, str] = {}
        if self._folder is not None:
            files = await asyncio.to_thread(self._folder.replace, wanted)
        self._delivered = wanted
        exit_code = await self._run_hook()
        if self._folder is not None:
            self._folder.discard_old()
        document: dict[str, Any] = {
            "spiffe_id": str(snapshot.spiffe_id),
            "serial": snapshot.serial,
            "expires_at": snapshot.not_after,
            "files": {name.rpartition(".")[0]: path for name, path in files.items()},
        }
        if self.delivery.hook:
            document["exec_exit_code"] = exit_code
        self._show(document, snapshot)
        if exit_code:
            raise HookFailed(
                f"the command of --exec failed with exit code {exit_code}",
                hint="the files are in place; what it printed is above",
            )

    def _show(self, document: dict[str, Any], snapshot: IdentitySnapshot) -> None:
        now = SystemClock().now()
        say(f"expires {distance(snapshot.not_after, now)}; serial {snapshot.serial}")
        if self.delivery.watch and self.delivery.output is OutputFormat.JSON:
            print(json.dumps(to_document(document)), flush=True)  # One line a rotation.
            return
        emit(
            self.delivery.output,
            document,
            lambda: "\n".join(document["files"].values()) or str(snapshot.spiffe_id),
        )

    async def _run_hook(self) -> int:
        """The hook's exit code; 0 without one, 127 when it could not be started, 124 too late."""
        if not self.delivery.hook:
            return 0
        try:
            process = await asyncio.create_subprocess_exec(
                *self.delivery.hook,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # stdout is data
                start_new_session=True,
            )
        except OSError as exc:
            say(f"{self.delivery.hook[0]}: {(exc.strerror or 'cannot be started').lower()}")
            return 127
        try:
            async with asyncio.timeout(_HOOK_SECONDS):
                return await process.wait()
        except TimeoutError:
            say(f"the command of --exec did not end within {_HOOK_SECONDS:g} s")
            return 124
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
