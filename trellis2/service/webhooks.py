"""Calls to the addresses that jobs name, signed as Standard Webhooks says (standardwebhooks.com).

A call is a POST of the job's JSON with three headers: ``webhook-id`` stays the same over all attempts,
``webhook-timestamp`` is the second of this attempt, and ``webhook-signature`` is "v1," and the base64 of the
HMAC-SHA256 over "id.timestamp.body", once for each secret, separated by spaces.  Any 2xx answer takes it; its body is
never read.

The address is a stranger's text, so nothing in it may reach what only this machine can: see ``checked_url`` and
``_resolved``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import random
import re
import socket
import sqlite3
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from trellis2.errors import InputError
from trellis2.version import VERSION

from .jobs import Delivery, Job, JobStore
from .settings import Settings

logger = logging.getLogger("trellis2.service")

EVENTS = ("start", "completed")
URL_CHARACTERS = 1000
_REST = "([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*"
URL_PATH = f"([/?]{_REST})?(#{_REST})?"
"""What may follow the host of an address, as a regular expression: RFC 3986's path, query and fragment."""
MAX_ATTEMPTS = 8
FIRST_DELAY = 5.0  # seconds before the second attempt; each later one waits four times as long as the one before
LONGEST_DELAY = 6 * 3600.0
ATTEMPT_SECONDS = 10.0  # of one attempt altogether, the search for the address aside
AT_ONCE = 8
LOOK_AGAIN = 60.0  # seconds between two looks when nothing is known to be due: clocks may be set

DELIVERED: Final = "delivered"
POSTPONED: Final = "postponed"
GIVEN_UP: Final = "given_up"

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")


class WebhookError(Exception):
    """An attempt failed; the text says why without telling what the network looks like from here."""


class GoneError(WebhookError):
    """The receiver wants no further calls."""


def checked_url(url: str, settings: Settings) -> str:
    """The address of a webhook; raises InputError where it is not allowed, which names tell only when looked up."""
    if not settings.webhook_secrets:
        raise InputError(
            "This service sends no webhooks, because TRELLIS2_WEBHOOK_SECRET is not set; leave webhook out."
        )
    shown = f"webhook={url[:80]!r}"
    parts = _parts(url)
    if parts is None or parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        raise InputError(f"{shown} must be an address such as https://example.com/hook, without a name and password.")
    host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    named = {host, f"{host}:{port}"} & set(settings.webhook_hosts)
    if settings.webhook_hosts and not named:
        raise InputError(f"{shown} names a host that is not among those in TRELLIS2_WEBHOOK_HOSTS.")
    if not settings.webhook_private:
        if parts.scheme != "https":
            raise InputError(f"{shown} must begin with https://.")
        if port not in _PORTS.values() and f"{host}:{port}" not in named:
            raise InputError(f"{shown} must use port 443 or 80.")
    with suppress(ValueError):
        if not _allowed(host, settings.webhook_private):
            raise InputError(f"{shown} must not be an address of a private network.")
    return url


def checked_events(text: str) -> tuple[str, ...]:
    """Names separated by commas; raises InputError for any that is no event."""
    events = tuple(word.strip() for word in text.split(","))
    if not set(events) <= set(EVENTS):
        raise InputError(f"webhook_events={text[:80]!r} must be start, completed, or both separated by a comma.")
    return events


def _parts(url: str) -> SplitResult | None:
    # Plain ASCII without backslashes: what libraries read differently is not read at all.
    if len(url) > URL_CHARACTERS or not re.fullmatch(
        rf"[a-z]+://[a-z0-9._~!$&'()*+,;=:@%\[\]-]*{URL_PATH}", url, re.IGNORECASE
    ):
        return None
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


def _allowed(address: str, private: bool) -> bool:
    """Whether to connect to a numeric address. Raises ValueError where it is none.

    private: also to this machine and closed networks, yet never to link-local addresses, where clouds tell secrets.
    """
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.sixtofour is not None or ip.teredo is not None:
            return False  # tunnels that end at any IPv4 address; nobody serves from them
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    if private:
        return True
    unicast = not ip.is_reserved if isinstance(ip, ipaddress.IPv4Address) else ip in _UNICAST
    return ip.is_global and unicast


def _resolved(host: str, port: int, private: bool) -> list[tuple[socket.AddressFamily, Any]]:
    """Families and socket addresses of a host, all of them allowed.

    Whoever connects to these, and not to the name, cannot be led elsewhere by an answer that changes in between.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not all(_allowed(str(address[0]), private) for *_, address in found):
            raise WebhookError("the host is in a private network")
    except (OSError, UnicodeError, ValueError) as error:
        raise WebhookError("the host was not found") from error
    return [(family, address) for family, *_, address in found]


def signed_headers(secrets: Sequence[bytes], delivery_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks."""
    content = f"{delivery_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, content, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def delay(attempts: int, chance: float) -> float | None:
    """Seconds before the next attempt after so many failed ones, None for no further one; chance: from 0 to 1.

    From half of the plan to one and a half, so that calls that failed together do not come back together.
    """
    if attempts >= MAX_ATTEMPTS:
        return None
    return float(min(FIRST_DELAY * 4 ** (attempts - 1), LONGEST_DELAY) * (0.5 + chance))


def post(url: str, body: bytes, headers: dict[str, str], *, private: bool, tls: ssl.SSLContext) -> None:
    """POST ``body``; raises WebhookError unless the answer is 2xx. Redirects are not followed, proxies not used."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    port = parts.port or _PORTS[parts.scheme]
    addresses = _resolved(parts.hostname, port, private)
    deadline = time.monotonic() + ATTEMPT_SECONDS
    try:
        connected = _connected(addresses, deadline)
        # A receiver that sends a byte now and then would pass the timeouts of its socket for ever. Closing the socket
        # does not wake who reads from it; shutting it down does.
        guard = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [connected])
        guard.daemon = True
        guard.start()
        try:
            if parts.scheme == "https":
                connected.settimeout(ATTEMPT_SECONDS)
                connected = tls.wrap_socket(connected, server_hostname=parts.hostname, do_handshake_on_connect=False)
                guard.args = [connected]  # the one before has given its descriptor away
                connected.do_handshake()
            status = _exchanged(connected, parts, body, headers)
        finally:
            guard.cancel()
            connected.close()
    except ssl.SSLCertVerificationError as error:
        raise WebhookError(f"its certificate was not accepted ({error.verify_message})") from error
    except (OSError, HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        raise WebhookError("it took too long" if late else f"it was not reached ({type(error).__name__})") from error
    if time.monotonic() >= deadline:  # headers that are cut off look like headers that end
        raise WebhookError("it took too long")
    if status == 410:
        raise GoneError("it answered 410")
    if not 200 <= status < 300:
        raise WebhookError(f"it answered {status}")


def _connected(addresses: Sequence[tuple[socket.AddressFamily, Any]], deadline: float) -> socket.socket:
    """A connection to the first address that takes one."""
    failure: OSError = TimeoutError()
    for family, address in addresses:
        if (left := deadline - time.monotonic()) <= 0:
            break
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(left if len(addresses) == 1 else min(left, ATTEMPT_SECONDS / 3))
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _exchanged(connected: socket.socket, parts: SplitResult, body: bytes, headers: dict[str, str]) -> int:
    """Send the request; returns the status of the answer and leaves its body unread."""
    connected.settimeout(ATTEMPT_SECONDS)
    http = HTTPConnection(parts.netloc)
    http.sock = connected
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    http.request("POST", target, body, {"Host": parts.netloc, "Connection": "close", **headers})
    return http.getresponse().status


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of the plain class: TLS would want to say goodbye


class Webhooks:
    """Makes the calls that the store plans, in threads of its own. ``attempts`` counts outcomes since the start.

    A call may arrive twice: when the service dies between making it and noting it.
    """

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        body: Callable[[Job], bytes],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.attempts: Counter[str] = Counter()
        self._settings = settings
        self._store = store
        self._body = body
        self._tls = tls or ssl.create_default_context()
        self._news = threading.Event()
        self._stopping = False
        self._busy: dict[str, threading.Thread] = {}
        self._thread = threading.Thread(target=self._run, name="trellis2-webhooks", daemon=True)

    def start(self) -> None:
        """Without secrets there is nothing to sign with, and calls of earlier times wait until there is."""
        if self._settings.webhook_secrets:
            if self._settings.webhook_private and not self._settings.webhook_hosts:
                logger.warning(
                    "TRELLIS2_WEBHOOK_PRIVATE is set without TRELLIS2_WEBHOOK_HOSTS: whoever submits jobs can make "
                    "this service call anything in its network."
                )
            self._store.announced = self._news.set
            self._thread.start()

    def stop(self) -> None:
        """End; calls under way have as long as an attempt takes, and are made again later where that is too short."""
        self._stopping = True
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()
            for thread in list(self._busy.values()):
                thread.join(1.0)

    def _run(self) -> None:
        while not self._stopping:
            self._news.clear()
            wait = LOOK_AGAIN
            try:
                now = time.time()
                self._begin(now)
                following = self._store.next_due(now)
                wait = LOOK_AGAIN if following is None else min(LOOK_AGAIN, following - now)
            except sqlite3.Error as error:
                logger.error("Webhooks: the database cannot be read (%s); trying again", error)
            self._news.wait(wait)

    def _begin(self, now: float) -> None:
        """Start what is due; when one ends, ``_news`` brings us here again."""
        for delivery in self._store.due(now):
            if len(self._busy) >= AT_ONCE:
                return
            if delivery.id not in self._busy:
                thread = threading.Thread(target=self._attempt, args=[delivery], name="trellis2-webhook", daemon=True)
                self._busy[delivery.id] = thread
                thread.start()

    def _attempt(self, delivery: Delivery) -> None:
        try:
            job = self._store.get(delivery.job_id)
            if job is not None:  # else removed with its calls
                self._call(delivery, job)
        except sqlite3.Error as error:
            if not self._stopping:
                logger.error("Webhooks: an attempt could not be noted (%s); it is repeated", error)
                time.sleep(1.0)
        finally:
            self._busy.pop(delivery.id, None)
            self._news.set()

    def _call(self, delivery: Delivery, job: Job) -> None:
        assert job.webhook is not None
        host = urlsplit(job.webhook).hostname  # the rest may hold a secret of the caller
        error, wait = None, None
        try:
            checked_url(job.webhook, self._settings)  # the settings may have changed since
            body = self._body(job)
            headers = signed_headers(self._settings.webhook_secrets, delivery.id, int(time.time()), body)
            headers |= {"Content-Type": "application/json", "User-Agent": f"trellis2/{VERSION}"}
            post(job.webhook, body, headers, private=self._settings.webhook_private, tls=self._tls)
        except (WebhookError, InputError) as failure:
            error = str(failure)
            if not isinstance(failure, GoneError):
                wait = delay(delivery.attempts + 1, random.random())
        outcome = DELIVERED if error is None else GIVEN_UP if wait is None else POSTPONED
        self._store.attempted(delivery.id, error, None if wait is None else time.time() + wait)
        self.attempts[outcome] += 1
        said = f"Webhook {delivery.event} to {host}: {outcome.replace('_', ' ')}"
        logger.info("%s", said if error is None else f"{said}, {error}", extra={"job_id": job.id})
