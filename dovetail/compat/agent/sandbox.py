"""Where agents act: a machine with a shell and files, used the same way wherever it is."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import shlex
import shutil
import signal
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dovetail.types.errors import ConfigError

EXIT_TIME_BUDGET_EXCEEDED = -2
EXIT_MARKER_UNREADABLE = -1
_FIRST_POLL_S, _LONGEST_POLL_S = 0.1, 5.0
_MOST_OUTPUT_BYTES = 16 << 20


@runtime_checkable
class Sandbox(Protocol):
    """An asynchronous context: entering it starts the machine, leaving it ends it."""

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def exec(
        self, cmd: str, *, user: str = ..., check: bool = ..., timeout: float | None = ...
    ) -> tuple[int, str, str]:
        """Exit code, output and error output of a shell command.

        Raises:
            RuntimeError: with `check`, if the exit code is not 0.
            TimeoutError: it took longer than `timeout` seconds.
        """
        ...

    async def write_file(self, path: str, content: str | bytes | Path, *, user: str = ...) -> None:
        """Write text, bytes, or the content of a file of ours; directories are made."""
        ...

    async def read_file(self, path: str, *, user: str = ...) -> str:
        """A file's text; "" if there is none."""
        ...


class LocalSandbox:
    """A directory on this machine: no walls around it, for tests and for agents that are trusted.

    Relative paths lie below `root`, where commands begin; absolute ones are this machine's. Every
    user is whoever runs this process.

    Example:
        >>> async with LocalSandbox() as sandbox:
        ...     await sandbox.write_file("a.txt", "hi")
        ...     code, out, _ = await sandbox.exec("cat a.txt")
    """

    def __init__(self, image: str | None = None) -> None:
        self.image = image
        self.root = Path()

    @property
    def scratch(self) -> str:
        """For files that are nobody's work."""
        return str(self.root / ".scratch")

    async def __aenter__(self) -> LocalSandbox:
        self.root = Path(tempfile.mkdtemp(prefix="sandbox-"))
        Path(self.scratch).mkdir()
        return self

    async def __aexit__(self, *exc: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    async def exec(
        self,
        cmd: str,
        *,
        user: str = "root",
        check: bool = False,
        timeout: float | None = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, str, str]:
        """See `Sandbox.exec`. The command and what it started end at the time limit."""
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            cmd,
            cwd=self.root,
            env={**os.environ, "SANDBOX_ROOT": str(self.root), **(env or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), timeout)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        code = process.returncode or 0
        output, error = (raw[:_MOST_OUTPUT_BYTES].decode(errors="replace") for raw in (out, err))
        if check and code != 0:
            raise RuntimeError(f"exit={code}: {cmd[:200]}: {(error or output)[-500:]}")
        return code, output, error

    async def write_file(
        self, path: str, content: str | bytes | Path, *, user: str = "root"
    ) -> None:
        """See `Sandbox.write_file`."""
        data = content.read_bytes() if isinstance(content, Path) else content
        place = self._place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data.encode() if isinstance(data, str) else data)

    async def read_file(self, path: str, *, user: str = "root") -> str:
        """See `Sandbox.read_file`."""
        place = self._place(path)
        return place.read_text(errors="replace") if place.is_file() else ""

    def _place(self, path: str) -> Path:
        return self.root / path


class E2BSandbox:
    """A machine of E2B, from the image (their template) that is named.

    Raises:
        ConfigError: the package e2b is not installed.
    """

    def __init__(
        self,
        image: str,
        *,
        timeout: int = 3600,
        metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None,
    ) -> None:
        self.image, self.timeout = image, timeout
        self.metadata, self.envs = dict(metadata or {}), dict(envs or {})
        self._kind = _e2b()
        self._machine: Any = None

    async def __aenter__(self) -> E2BSandbox:
        self._machine = await self._kind.create(
            template=self.image, timeout=self.timeout, metadata=self.metadata, envs=self.envs
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        machine, self._machine = self._machine, None
        if machine is not None:
            await machine.kill()

    async def exec(
        self,
        cmd: str,
        *,
        user: str = "root",
        check: bool = False,
        timeout: float | None = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, str, str]:
        """See `Sandbox.exec`."""
        try:
            done = await self._machine.commands.run(
                cmd, user=user, timeout=timeout or 0, envs=dict(env or {})
            )
        # Their client raises where a command fails; the exception is a result as well.
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            done = error
        if check and done.exit_code != 0:
            told = (done.stderr or done.stdout)[-500:]
            raise RuntimeError(f"exit={done.exit_code}: {cmd[:200]}: {told}")
        return done.exit_code, done.stdout, done.stderr

    async def write_file(
        self, path: str, content: str | bytes | Path, *, user: str = "root"
    ) -> None:
        """See `Sandbox.write_file`."""
        data = content.read_bytes() if isinstance(content, Path) else content
        await self._machine.files.write(path, data, user=user)

    async def read_file(self, path: str, *, user: str = "root") -> str:
        """See `Sandbox.read_file`."""
        if not await self._machine.files.exists(path, user=user):
            return ""
        return str(await self._machine.files.read(path, user=user))


def _e2b() -> Any:
    try:
        return importlib.import_module("e2b").AsyncSandbox
    except ImportError as error:
        raise ConfigError(
            "E2BSandbox needs the package e2b, which is not installed: pip install e2b (and set "
            "E2B_API_KEY)"
        ) from error


async def ensure_agent_user(sb: Sandbox, workdir: str) -> None:
    """Make the user `agent`, whom `workdir` belongs to, where the machine has users to make."""
    quoted = shlex.quote(workdir)
    await sb.exec(
        f'mkdir -p {quoted}; if command -v useradd >/dev/null && [ -z "$SANDBOX_ROOT" ]; then '
        f"id agent >/dev/null 2>&1 || useradd -m -s /bin/bash agent; chown -R agent {quoted}; fi",
        user="root",
        check=True,
        timeout=120,
    )


async def exec_and_wait(
    sb: Sandbox,
    *,
    cmd: str,
    time_budget_sec: float,
    tag: str,
    user: str = "root",
    env: Mapping[str, str] | None = None,
    workdir: str | None = None,
    **output: Any,
) -> tuple[int, str]:
    """Run a command that may take longer than a connection lasts: it is started detached, and
    looked after until its marker is there.

    Args:
        tag: part of the names of its files.
        out_file: where its output goes; default: beside its marker.
        want_output: give that back too.

    Returns:
        Its exit code, or -2 after `time_budget_sec` (it is ended then); and its output or "".
    """
    base = f"{getattr(sb, 'scratch', '/tmp')}/exec-{tag}-{uuid.uuid4().hex[:8]}"
    script, marker, pid = (f"{base}.{end}" for end in ("sh", "done", "pid"))
    out_file = output.get("out_file") or f"{base}.out"
    exports = "".join(f"export {name}={shlex.quote(str(v))}\n" for name, v in (env or {}).items())
    into = f"cd {shlex.quote(workdir)} || exit 1\n" if workdir else ""
    await sb.write_file(script, f"{exports}{into}{cmd}\n", user=user)
    await sb.exec(
        f"mkdir -p $(dirname {out_file}); setsid bash -c 'bash {script} > {out_file} 2>&1; "
        f"echo $? > {marker}.part; mv {marker}.part {marker}' >/dev/null 2>&1 </dev/null & "
        f"echo $! > {pid}",
        user=user,
        check=True,
        timeout=30,
    )
    code = await _wait_for(sb, marker, time_budget_sec, user)
    if code == EXIT_TIME_BUDGET_EXCEEDED:
        await sb.exec(f"kill -9 -- -$(cat {pid})", user=user, timeout=30)
    text = await sb.read_file(out_file, user=user) if output.get("want_output") else ""
    return code, text


async def _wait_for(sb: Sandbox, marker: str, time_budget_sec: float, user: str) -> int:
    loop = asyncio.get_running_loop()
    end, pause_s = loop.time() + time_budget_sec, _FIRST_POLL_S
    while True:
        text = (await sb.read_file(marker, user=user)).strip()
        if text:
            return int(text) if text.isdigit() else EXIT_MARKER_UNREADABLE
        if loop.time() >= end:
            return EXIT_TIME_BUDGET_EXCEEDED
        await asyncio.sleep(min(pause_s, max(0.0, end - loop.time())))
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)
