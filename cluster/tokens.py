"""Bearer tokens: a file of their hashes, and who shows one of them.

A token is ``svt_ID_SECRET``. The file names it by ID and holds the SHA-256 of the whole, so that it
lets nobody in who reads it.
"""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.cluster.codec import Refusal
from silvershard.cluster.reloaded import Reloaded
from silvershard.cluster.roles import Caller, Role
from silvershard.cluster.secret_file import check_private
from silvershard.shard.errors import ConfigError

_PREFIX = "svt"
_ID_BYTES, _SECRET_BYTES = 4, 32


class TokenRow(BaseModel):
    """What is kept of one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_id: str = Field(pattern=r"^[0-9a-f]{8}$", description="the part by which it is found")
    name: str = Field(min_length=1, max_length=64, description="whose it is")
    roles: tuple[Role, ...] = Field(min_length=1, description="what it is good for")
    tenant: str = Field(default="", max_length=64, description="only this one; empty: any")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the whole token")
    created_unix_s: int = Field(ge=0, description="when it was made")
    expires_unix_s: int = Field(default=0, ge=0, description="until when it is good; 0: for ever")

    def described(self, now_unix_s: float) -> dict[str, object]:
        """Return what people may see of it."""
        return {
            "token_id": self.token_id,
            "name": self.name,
            "roles": list(self.roles),
            "tenant": self.tenant,
            "created": _time(self.created_unix_s),
            "expires": _time(self.expires_unix_s) if self.expires_unix_s else "",
            "expired": bool(self.expires_unix_s) and now_unix_s >= self.expires_unix_s,
        }


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class TokenFile(BaseModel):
    """All tokens of a cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenRow, ...] = Field(default=(), description="in the order of their making")

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [one.token_id for one in self.tokens]
        if len(set(named)) < len(named):
            raise ValueError("token_id must be given once")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the tokens in a file.

        Raises:
            ConfigError: if it is not there, others can read it, or it is no such file.
        """
        check_private(path, "security.tokens")
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"security.tokens {path}: {error.strerror}") from None
        except pydantic.ValidationError as error:
            # What a file holds must not get into a message.
            problem = error.errors(include_input=False)[0]
            where = ".".join(map(str, problem["loc"])) or "content"
            message = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"security.tokens {path}: {where}: {message}") from None

    def write(self, path: Path) -> None:
        """Replace the file atomically, mode 0600.

        Raises:
            ConfigError: if it cannot be written.
        """
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConfigError(f"security.tokens {path}: {error.strerror}") from None


class Made(NamedTuple):
    """A new token."""

    text: str
    """The token itself, which is kept nowhere."""
    row: TokenRow


def make_token(
    name: str,
    roles: Sequence[Role],
    *,
    tenant: str = "",
    now_unix_s: int,
    expires_unix_s: int = 0,
) -> Made:
    """Return a new token; it is good once its row is in the file.

    Raises:
        ConfigError: if a name or a time cannot be used.
    """
    token_id = secrets.token_hex(_ID_BYTES)
    text = f"{_PREFIX}_{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    try:
        row = TokenRow(
            token_id=token_id,
            name=name,
            roles=tuple(dict.fromkeys(roles)),
            tenant=tenant,
            sha256=_digest(text),
            created_unix_s=now_unix_s,
            expires_unix_s=expires_unix_s,
        )
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"token: {problem['loc'][0]}: {problem['msg'].lower()}") from None
    return Made(text, row)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Tokens:
    """The tokens that a server knows; it follows their file. Any thread may ask."""

    def __init__(
        self, path: Path, *, every_s: float = 0.5, wall: Callable[[], float] = time.time
    ) -> None:
        """Read them.

        Args:
            path: their file.
            every_s: least time between two looks at it.
            wall: in seconds since 1970, for the ends of tokens.

        Raises:
            ConfigError: if the file cannot be used.
        """
        self._wall = wall
        self._rows = Reloaded(
            [path],
            lambda: {one.token_id: one for one in TokenFile.read(path).tokens},
            every_s=every_s,
        )

    def caller(self, token: str) -> Caller:
        """Return whose a token is.

        Raises:
            Refusal: UNAUTHENTICATED if it is nobody's, or its time is over.
        """
        parts = token.split("_", 2)
        row = self._rows.value.get(parts[1]) if len(parts) == 3 else None
        # Both sides of the comparison have one length, and it takes one time.
        if row is None or not hmac.compare_digest(_digest(token), row.sha256):
            raise Refusal("UNAUTHENTICATED", "the token is not known here", "TOKEN_UNKNOWN")
        if row.expires_unix_s and self._wall() >= row.expires_unix_s:
            raise Refusal(
                "UNAUTHENTICATED",
                f"the token {row.token_id} of {row.name!r} has expired",
                "TOKEN_EXPIRED",
            )
        return Caller(row.name, frozenset(row.roles), row.tenant)
