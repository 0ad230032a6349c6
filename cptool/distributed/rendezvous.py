"""Where ranks meet, and on which interfaces they listen.

Local ranks meet in a file of their run's private folder, and all their sockets are on loopback.
Under a launcher, ranks meet at the address that it names, and listen there and on the interface
that leads there.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cptool.distributed.environment import Seat, set_rendezvous_address
from cptool.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

LOOPBACK = "lo"
START_S = 5.0
"""Time that ranks have beyond their timeout to start and meet, on a busy machine."""
_SLACK_S = 3.0  # for the calls that keep to a deadline by themselves to report why it passed
_RETRY_S = 0.2


def file_store(folder: str, size: int) -> dist.Store:
    """Return the store of `size` local ranks, in their run's private folder. Opens no socket."""
    import torch.distributed as dist

    return dist.FileStore(os.path.join(folder, "store"), size)


def listen_on_loopback() -> None:
    """Have gloo and NCCL, which use TCP even within one machine, listen on loopback alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK


def check_loopback() -> None:
    """Raise UserError if the loopback interface, which local ranks need, is down."""
    failures: list[OSError] = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # nothing is sent
                return
        except OSError as error:
            failures.append(error)
    raise UserError(
        "ranks communicate over the loopback interface, which does not work here "
        f"({failures[0].strerror}); bring it up (ip link set {LOOPBACK} up), or use one rank"
    )


def launchers_store(seat: Seat, timeout: float) -> dist.Store:
    """Return the store at the MASTER_ADDR and MASTER_PORT of a launcher.

    torchrun's agent hosts it, or else rank 0, which listens on that address alone. Raises
    UserError, with both names, if the store is not reached within `timeout` seconds.
    """
    set_rendezvous_address()
    host, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout
    address = _resolved(host, port, deadline)
    _choose_interface(seat, address)
    listener = None
    if seat.rank == 0 and not by_agent:
        listener = _listener(seat, host, address)
    else:
        _reach(host, address, deadline)

    import torch.distributed as dist

    def connect() -> dist.Store:
        own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
        return dist.TCPStore(
            address[1][0],
            port,
            seat.size,
            listener is not None,
            timeout=datetime.timedelta(seconds=timeout + START_S),
            wait_for_workers=False,
            **own,
        )

    # A service that accepts a connection and does not respond would block the call forever.
    store = _within(max(1.0, deadline - time.monotonic()), connect)
    if store is None:
        raise UserError(
            f"MASTER_ADDR {host}, MASTER_PORT {port}: what listens there is not the ranks' store "
            f"(no answer within {timeout:g} s); choose a port that no other service uses"
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cptool/{attempt}", store)


def meet(store: dist.Store, seat: Seat, timeout: float, where: str = "") -> None:
    """Block until every rank is here.

    Raises DistStoreError that names the ranks that are missing after `timeout` seconds.

    where: appended to their names, such as " to ADDRESS".
    """
    import torch.distributed as dist

    keys = [f"here/{rank}" for rank in range(seat.size)]
    store.set(keys[seat.rank], "here")
    deadline, pause = time.monotonic() + timeout, 0.005
    # Not the store's own wait, which fills the screen when it times out.
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [f"rank {r}" for r, key in enumerate(keys) if not store.check([key])]
            raise dist.DistStoreError(f"{', '.join(missing)} did not come{where} in {timeout:g} s")
        time.sleep(pause)
        pause = min(_RETRY_S, 1.5 * pause)


def launchers_address() -> str:
    """Return MASTER_ADDR and MASTER_PORT as messages name them."""
    return f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"


@contextlib.contextmanager
def start_deadline(timeout: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Call `give_up`, which ends the process, from a thread if the body is not done in time.

    The body has `timeout` seconds and some slack. This is for calls of the library that have no
    deadline of their own.
    """
    timer = threading.Timer(timeout + START_S + _SLACK_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT is {text!r}; it must be a port, 1 to 65535")
    return int(text)


def _resolved(host: str, port: int, deadline: float) -> tuple[int, tuple]:
    """Return family and socket address of the host.

    A name may become known only in a moment, so this retries until `deadline`.
    """
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return next((family, address) for family, _, _, _, address in found)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or not _may_pass(error):
                raise UserError(
                    f"MASTER_ADDR {host}, MASTER_PORT {port}: the address is not known here "
                    f"({getattr(error, 'strerror', None) or error}); set it to that of rank 0's "
                    "host"
                ) from None
        time.sleep(_RETRY_S)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN


def _listener(seat: Seat, host: str, address: tuple[int, tuple]) -> socket.socket:
    family, where = address
    if seat.local_size < seat.size and ipaddress.ip_address(where[0].split("%")[0]).is_loopback:
        raise UserError(
            f"MASTER_ADDR {host} is {where[0]} on rank 0's host, where other hosts cannot reach "
            "it; set it to the address of an interface"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(4096)
    except OSError as error:
        listener.close()
        remedy = (
            "choose a port that no other service uses"
            if error.errno == errno.EADDRINUSE
            else "MASTER_ADDR must be an address of rank 0's host"
        )
        raise UserError(
            f"MASTER_ADDR {host}, MASTER_PORT {where[1]}: rank 0 cannot listen there "
            f"({error.strerror}); {remedy}"
        ) from None
    return listener


def _reach(host: str, address: tuple[int, tuple], deadline: float) -> None:
    """Block until something listens at the address; torch's own attempts fill the screen."""
    family, where = address
    while True:
        left = max(_RETRY_S, deadline - time.monotonic())
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(left)
                probe.connect(where)
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR {host}, MASTER_PORT {where[1]}: nothing answers there "
                    f"({error.strerror or error}); is rank 0 running, and is that its host?"
                ) from None
        time.sleep(_RETRY_S)


def _within(seconds: float, call: Callable[[], dist.Store]) -> dist.Store | None:
    """Return what `call` returns; None if it fails or does not return in time."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(call())
        except (RuntimeError, OSError):
            results.put(None)

    threading.Thread(target=work, name="cptool-store", daemon=True).start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        return None


def _choose_interface(seat: Seat, address: tuple[int, tuple]) -> None:
    """Choose the interface that ranks listen on, unless the user names one.

    It is loopback if all ranks are on this machine, otherwise the one that leads to MASTER_ADDR.
    """
    family, where = address
    loopback = ipaddress.ip_address(where[0].split("%")[0]).is_loopback
    # Ranks started by hand may have no LOCAL_WORLD_SIZE, and then `local_size` is only assumed.
    known = "LOCAL_WORLD_SIZE" in os.environ or "RANK" not in os.environ
    if loopback or (known and seat.local_size == seat.size):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface_to(family, where)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_to(family: int, where: tuple) -> str | None:
    """Return the interface through which packets to an IPv4 address leave.

    None if it is unknown; then gloo's own rule holds, the address of this host's name.
    """
    if family != socket.AF_INET:
        return None
    import fcntl

    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(where)  # nothing is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                found = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None
