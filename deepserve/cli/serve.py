"""`deepserve serve MODEL ...`: the plan, the port, then the server. What can be refused is refused before loading."""

from __future__ import annotations

import errno
import socket

from deepserve.cli.flags import config_from_args
from deepserve.config import Config
from deepserve.errors import AskError


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit status."""
    config = config_from_args(argv)
    from deepserve import log
    from deepserve.facts import gather_facts
    from deepserve.plan import make_plan

    log.setup(config.log_level)
    plan = make_plan(config, gather_facts(config))
    plan.refuse_blockers()
    listener = bind(config)
    try:
        from deepserve.server.lifecycle import serve
    except ModuleNotFoundError as error:
        hint = "pip install 'deepserve[server]'"
        raise AskError(f"the package {error.name} is not installed", field="serve", hint=hint) from None
    return serve(config, plan, listener)


def bind(config: Config) -> socket.socket:
    """The socket to listen on: --host, else this machine alone, or everybody who has the --api-key."""
    host = config.host or ("0.0.0.0" if config.api_key else "127.0.0.1")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except socket.gaierror as error:
        raise AskError(f"{host} is no address of this machine: {error.strerror}", field="host") from None
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        hint = "another process listens there; choose another --port, 0 takes a free one" if in_use else None
        field = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise AskError(f"cannot listen on {host}:{config.port}: {error.strerror}", field=field, hint=hint) from None
    return listener
