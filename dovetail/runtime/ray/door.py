"""Whether a Ray cluster is there and lets us in: a head asks for a token where its environment says
so, and Ray itself tries for minutes and then says only that nothing was reached."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket

_ANSWERS_S = 5.0
_GENERATED = "ray.core.generated.gcs_service"
TOKEN_CURE = (
    "set the head's own in the environment of the run and of every `ray start`: "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=... (or RAY_AUTH_TOKEN_PATH=FILE). "
    "`ray get-auth-token` tells it on the machine of the head"
)


def absence(address: str) -> str | None:
    """Why nothing answers at `HOST:PORT`; None: something does."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        return f"{port!r} is no port"
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def refusal(address: str) -> str | None:
    """Why the head at `HOST:PORT` does not let this process in; None: it does, or nothing is known.

    The token itself is never in it.
    """
    try:
        grpc = importlib.import_module("grpc")
        messages = importlib.import_module(f"{_GENERATED}_pb2")
        stubs = importlib.import_module(f"{_GENERATED}_pb2_grpc")
    except ImportError:
        return None
    mode, token = os.environ.get("RAY_AUTH_MODE", "").lower(), _token()
    sent = mode == "token" and token is not None
    with grpc.insecure_channel(address) as channel:
        stub = stubs.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetClusterId(
                messages.GetClusterIdRequest(),
                timeout=_ANSWERS_S,
                metadata=[("authorization", f"Bearer {token}")] if sent else None,
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                return None
            return _said(mode, token)
    return None


def _said(mode: str, token: str | None) -> str:
    if mode != "token":
        there = ", and RAY_AUTH_MODE is not token here" if token is not None else ""
        return f"it wants a token (InvalidAuthToken){there}"
    if token is None:
        return "it wants a token (InvalidAuthToken), and there is none here"
    return "it wants another token than the one here (InvalidAuthToken)"


def _token() -> str | None:
    """What Ray would send, in its own order of places."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read().strip() or None
    return None
