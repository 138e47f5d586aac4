"""How commands reach a cluster: with a token of their own, or as who owns the state directory."""

import argparse
import os
from pathlib import Path

from silvershard.cluster.dialer import PLAIN, Dialer, peer_dialer
from silvershard.cluster.secret_file import check_private
from silvershard.cluster.tls import ClientTls
from silvershard.deploy.config import Config
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.errors import ConfigError

TOKEN_VARIABLE = "SILVERSHARD_TOKEN"


def access_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a command shows who it is, and knows the cluster."""
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file of the bearer token to show (default ${TOKEN_VARIABLE}, else the right of who "
        "owns the state directory)",
    )
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="PEM of the CAs by which the cluster is known (default: as in the state directory)",
    )


def secured(config: Config, state: StateDir, *, own_secret: bool = True) -> Config:
    """Return settings whose files of security are absolute paths, with those that were left out.

    Args:
        config: settings.
        state: the directory that they are for.
        own_secret: a secret that was left out is one of the directory, which other hosts lack.
    """
    security = config.security
    tls = security.tls.model_copy(
        update={
            key: str(Path(value).absolute())
            for key in ("certificate", "key", "ca", "client_ca")
            if (value := getattr(security.tls, key))
        }
    )
    secret = security.secret or (state.secret_file if own_secret else "")
    update = {
        "tls": tls,
        "tokens": str(Path(security.tokens).absolute()) if security.tokens else "",
        "secret": str(Path(secret).absolute()) if secret else "",
        "audit": str(Path(security.audit or state.audit_file).absolute()),
    }
    return config.model_copy(update={"security": security.model_copy(update=update)})


def dialer_within(record: ClusterRecord | None) -> Dialer:
    """Return how the owner of a state directory reaches every process of its cluster.

    Raises:
        ConfigError: if the secret cannot be read.
    """
    return peer_dialer(record.security.peers) if record is not None else PLAIN


def dialer_of(options: argparse.Namespace, state: StateDir) -> Dialer:
    """Return how a command reaches the cluster that its options name.

    What they leave out is as in the state directory, unless they name another address.

    Raises:
        ConfigError: if a token or a certificate cannot be read.
    """
    token = _token(options.token_file)
    record = None
    if not getattr(options, "address", "") and state.root.is_dir():
        record = state.read_record()
    own = dialer_within(record)
    tls = own.tls
    if options.ca is not None:
        tls = tls._replace(roots=options.ca) if tls is not None else ClientTls(options.ca)
    return Dialer(token or own.token, tls, own.insecure)


def _token(path: Path | None) -> str:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    check_private(path, "--token-file")
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path} must hold ASCII text") from None
    if not token or len(token.split()) != 1:
        raise ConfigError(f"--token-file {path} must hold one token")
    return token
