"""A judge behind HTTP: POST {prompt, response, label}, read a number or an object.

What may pass is tried again within the time limit: a broken connection, a status of 429 or 5xx, an
answer that is not JSON. Redirects and link-local addresses (where clouds keep their credentials)
are refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from dovetail.types.errors import ConfigError, RewardError
from dovetail.types.sample import Sample

if TYPE_CHECKING:
    from dovetail.config.sections import RewardConfig

_MOST_REPLY_BYTES = 1 << 20
_MOST_CONNECTIONS = 64
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
# Metadata services of clouds that are not link-local: AWS over IPv6, Alibaba, Azure.
_METADATA_ADDRESSES = {"fd00:ec2::254", "100.100.100.200", "168.63.129.16"}


class RemoteReward:
    """What the judge at `url` says.

    Args:
        url: http or https address.
        timeout_s: seconds for one sample with all tries; one try gets half of it, so that a judge
            that hangs once is asked again.
        reward_key: without it, an answer {"reward": x} is taken as x.
    """

    def __init__(self, url: str, *, timeout_s: float, reward_key: str | None = None) -> None:
        check_url(url)
        self._url = url
        self._timeout_s = timeout_s
        self._reward_key = reward_key
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retries = 0

    @classmethod
    def from_config(cls, reward: RewardConfig, seed: int) -> RemoteReward:
        """The judge at `rm_url`.

        Raises:
            ConfigError: no address, or one that is refused.
        """
        if reward.rm_url is None:
            raise ConfigError(
                "the reward remote_rm needs an address: --rm-url (TOML: reward.rm_url), "
                "e.g. http://127.0.0.1:8000/score"
            )
        return cls(reward.rm_url, timeout_s=reward.reward_timeout_s, reward_key=reward.reward_key)

    async def __call__(self, sample: Sample, response: str) -> Any:
        """The judge's answer.

        Raises:
            TimeoutError: no good answer in time; the message has the last fault.
            RewardError: an answer that another try would not change.
        """
        body = {"prompt": sample.prompt, "response": response, "label": sample.label}
        faults: list[_Passing] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                return self._unwrap(await self._ask_until_good(body, sample.index, faults))
        except TimeoutError as error:
            last = faults[-1] if faults else "no answer at all"
            raise TimeoutError(
                f"{self._url} gave no good answer in {self._timeout_s:g} s; the last: {last}"
            ) from error

    async def _ask_until_good(
        self, body: dict[str, Any], index: int | None, faults: list[_Passing]
    ) -> Any:
        for pause_s in _pauses(index):
            try:
                return await self._ask(body)
            except _Passing as fault:
                faults.append(fault)
            self._retries += 1
            await asyncio.sleep(pause_s)

    async def _ask(self, body: dict[str, Any]) -> Any:
        session = self._open()
        limit = aiohttp.ClientTimeout(total=self._timeout_s / 2)
        try:
            async with session.post(
                self._url, json=body, allow_redirects=False, timeout=limit
            ) as reply:
                if reply.status == 429 or reply.status >= 500:
                    raise _Passing(f"status {reply.status}")
                if reply.status != 200:
                    raise RewardError(f"{self._url} answered with status {reply.status}")
                return json.loads(await _read(reply))
        except TimeoutError as error:
            raise _Passing(f"no answer within {limit.total:g} s") from error
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, _RefusedAddress):
                raise RewardError(str(error.os_error)) from error
            raise _Passing(str(error)) from error
        except aiohttp.InvalidURL as error:
            raise RewardError(f"{self._url} is refused: {error}") from error
        except aiohttp.ClientError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise _Passing(f"an answer that is not JSON: {error}") from error

    def _unwrap(self, reply: Any) -> Any:
        if self._reward_key is None and isinstance(reply, dict) and "reward" in reply:
            return reply["reward"]
        return reply

    def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            connector = aiohttp.TCPConnector(
                limit=_MOST_CONNECTIONS, resolver=_GuardedResolver(), force_close=False
            )
            # No proxies, cookies or credentials out of the environment.
            self._session = aiohttp.ClientSession(
                connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
            )
            self._loop = loop
        return self._session

    def metrics(self) -> dict[str, float]:
        """Tries beyond the first, since the last call."""
        retries, self._retries = self._retries, 0
        return {"reward/remote_retries": float(retries)} if retries else {}

    def close(self) -> None:
        """Close the connections, inside of the event loop or after it."""
        session, loop = self._session, self._loop
        self._session = self._loop = None
        if session is None or loop is None:
            return
        if loop.is_closed():
            session.detach()  # Its sockets were closed with the loop.
        elif loop.is_running():
            self._closing = loop.create_task(session.close())
        else:
            loop.run_until_complete(session.close())


class _Passing(Exception):
    """A fault that another try may not meet."""


class _RefusedAddress(OSError):
    """The judge's name leads to an address that no judge has."""


class _GuardedResolver(AbstractResolver):
    """Looks names up on a thread, and refuses what leads to a metadata service."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        for result in results:
            if _is_metadata(result["host"]):
                raise _RefusedAddress(f"{host} leads to {result['host']}, which is refused")
        return results

    async def close(self) -> None:
        await self._resolver.close()


def check_url(url: str) -> None:
    """Refuse what is no http(s) address of a judge.

    Raises:
        ConfigError: another scheme, no host, or a metadata service's address.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(
            f"--rm-url (TOML: reward.rm_url) {url!r} is no address: {error}"
        ) from error
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            f"--rm-url (TOML: reward.rm_url) is {url!r}; expected http://host:port/path or https://..."
        )
    if _is_metadata(host):
        raise ConfigError(
            f"--rm-url (TOML: reward.rm_url) is {url!r}: a cloud's metadata service is no judge"
        )


def _is_metadata(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return address.is_link_local or str(address) in _METADATA_ADDRESSES


def _pauses(index: int | None) -> Iterator[float]:
    """Seconds between tries: doubling, each sample at moments of its own."""
    draw = random.Random(index or 0).random
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s * (0.5 + draw())
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in reply.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > _MOST_REPLY_BYTES:
            raise RewardError(f"an answer of more than {_MOST_REPLY_BYTES} bytes")
    return body
