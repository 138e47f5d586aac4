"""Who may call a server: it asks for a bearer token, or for the secret of the cluster."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from silvershard.cluster.audit import AuditLog
from silvershard.cluster.codec import Refusal
from silvershard.cluster.dialer import Dialer, peer_dialer
from silvershard.cluster.listen import Door
from silvershard.cluster.metrics import Counter, Metrics
from silvershard.cluster.roles import ANYBODY, CALLER, NOBODY, PEER, Caller, needed, needed_within
from silvershard.cluster.secret_file import read_secret
from silvershard.cluster.security_config import PeerSection, SecuritySection
from silvershard.cluster.service import abort
from silvershard.cluster.tls import server_credentials
from silvershard.cluster.tokens import Tokens

_SCHEME = "bearer "

Identify = Callable[[str], Caller]
"""Returns whose a token is; raises Refusal if it is nobody's."""
Note = Callable[[Caller, str, Refusal, str], None]
"""Hears of a refused call: who, which method, why, and from which address."""


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls in by the token that they show; a stream shows it once, when it opens.

    A call that is refused is not read. What the token must be good for depends on the method alone.
    """

    def __init__(
        self, identify: Identify, need: Callable[[str], str], note: Note | None = None
    ) -> None:
        """Make a gate.

        Args:
            identify: returns whose a token is.
            need: returns what a method needs.
            note: hears of refused calls.
        """
        self._identify = identify
        self._need = need
        self._note = note

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of a call, or one that refuses it."""
        method = handler_call_details.method
        need = self._need(method)
        if need == ANYBODY:
            return await continuation(handler_call_details)
        caller = NOBODY
        try:
            caller = self._identify(_token(handler_call_details.invocation_metadata))
            if not caller.may(need):
                raise Refusal(
                    "PERMISSION_DENIED",
                    f"the token of {caller.name!r} is good for {', '.join(sorted(caller.roles))}; "
                    f"this call needs {need}",
                    "ROLE_MISSING",
                )
        except Refusal as refusal:
            return self._refusing(caller, method, refusal)
        return _known_to(await continuation(handler_call_details), caller)

    def _refusing(self, caller: Caller, method: str, refusal: Refusal) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            if self._note is not None:
                self._note(caller, method, refusal, context.peer())
            await abort(context, refusal)

        # Of this kind, whatever the method is: it does not wait for a message.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _token(metadata: Any) -> str:
    """Return the token that a call shows.

    Raises:
        Refusal: if it shows none.
    """
    for key, value in metadata or ():
        if key == "authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
            return str(value[len(_SCHEME) :]).strip()
    raise Refusal(
        "UNAUTHENTICATED",
        "a token is needed, as metadata `authorization: Bearer TOKEN`",
        "TOKEN_MISSING",
    )


def _known_to(handler: Any, caller: Caller) -> Any:
    """Return a handler whose task knows who calls; of calls with one message and one answer."""
    if handler is None or handler.unary_unary is None:
        return handler

    async def called(message: Any, context: grpc.aio.ServicerContext) -> Any:
        CALLER.set(caller)
        return await handler.unary_unary(message, context)

    return grpc.unary_unary_rpc_method_handler(
        called,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def tenant_of(claimed: str) -> str:
    """Return the tenant that the call which this task serves acts for.

    Args:
        claimed: what its request says; empty: that of its token.

    Raises:
        Refusal: if its token is of another tenant.
    """
    own = CALLER.get().tenant
    if not own or claimed in ("", own):
        return own or claimed
    raise Refusal(
        "PERMISSION_DENIED",
        f"the token is of tenant {own!r}, the request of {claimed[:64]!r}",
        "TENANT_MISMATCH",
    )


class _Peer:
    """Knows the secret of the cluster."""

    def __init__(self, secret: str) -> None:
        self._digest = hashlib.sha256(secret.encode()).digest()

    def is_one(self, token: str) -> bool:
        """Return whether a token is the secret."""
        shown = hashlib.sha256(token.encode(errors="replace")).digest()
        return hmac.compare_digest(shown, self._digest)

    def caller(self, token: str) -> Caller:
        """Return who shows the secret.

        Raises:
            Refusal: if it is another one.
        """
        if self.is_one(token):
            return PEER
        raise Refusal("UNAUTHENTICATED", "this port is for the cluster alone", "TOKEN_UNKNOWN")


class Protection(NamedTuple):
    """What a server is made with."""

    interceptors: tuple[Any, ...] = ()
    """The first ones that it needs."""
    door: Door = Door()


def front_protection(
    section: SecuritySection, audit: AuditLog | None = None, metrics: Metrics | None = None
) -> Protection:
    """Return what protects a server that people and their programs call.

    Where tokens are set up, one of them is needed, or the secret of the cluster.

    Args:
        section: what was decided.
        audit: hears of refused calls.
        metrics: where a counter of them is added.

    Raises:
        ConfigError: if a file cannot be used.
    """
    door = Door(server_credentials(section.tls), bool(section.tokens), section.insecure)
    if not section.tokens:
        return Protection((), door)
    tokens = Tokens(Path(section.tokens))
    peer = _Peer(read_secret(Path(section.secret))) if section.secret else None
    counter = Counter("code")
    if metrics is not None:
        metrics.add(
            "silvershard_refused_calls_total",
            "Calls that were not let in, by the name of their gRPC status.",
            counter,
        )

    def identify(token: str) -> Caller:
        return PEER if peer is not None and peer.is_one(token) else tokens.caller(token)

    def note(caller: Caller, method: str, refusal: Refusal, address: str) -> None:
        counter.add(refusal.code)
        if audit is not None:
            audit.refused(caller.name, method, refusal.code, refusal.reason, peer=address)

    return Protection((Gate(identify, needed, note),), door)


class Peers(NamedTuple):
    """What a process of a cluster lets the others in by, and reaches them with."""

    protection: Protection = Protection()
    dialer: Dialer = Dialer()


ALONE = Peers()
"""Of processes that show each other nothing, on the loopback address."""


def peers_of(section: PeerSection) -> Peers:
    """Return how a process meets the others of its cluster.

    Raises:
        ConfigError: if a file cannot be used.
    """
    # Who shows the secret needs no certificate, which open channels could not rotate.
    tls = section.tls.model_copy(update={"client_ca": ""})
    door = Door(server_credentials(tls), bool(section.secret), section.insecure)
    gates: tuple[Any, ...] = ()
    if section.secret:
        gates = (Gate(_Peer(read_secret(Path(section.secret))).caller, needed_within),)
    return Peers(Protection(gates, door), peer_dialer(section))
