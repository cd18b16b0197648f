"""The end of a site's SuperNode, and its restart."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import psutil

from fedsynth.deployment.policy import Place
from fedsynth.deployment.site.ready import server
from fedsynth.deployment.site.rows import source_changed
from fedsynth.simulation.flower import LaunchFailed, ending, listens

AGAIN_SECONDS = 5.0  # before a SuperNode that ended is started again
SHORT_SECONDS = 45.0  # a SuperNode that lived no longer was refused
SILENT_SECONDS = 30.0  # without a connection; Flower itself waits up to 20 between two tries
LOOK_SECONDS = 2.0
READ_SECONDS = 60.0  # between two checks for changes of the site's file
REFUSED_SECONDS = 90.0  # longest time of refusals; longer than a server needs to detect a dead SuperNode


class SiteFailed(LaunchFailed):
    """A site's SuperNode could not be started, or ended by itself; the message is one line."""

    what = "the site failed"


@dataclass
class Patience:
    """Decides if an ended SuperNode is started again.

    Flower's SuperNode may exit on a network cut. The server considers a killed node online for a minute, and refuses
    its successor for as long.
    """

    place: Place
    first: float | None = None  # end of the first of several short-lived SuperNodes

    def wait(self, said: str, lived: float) -> None:
        """Waits until the next one is due.

        Args:
            said: The end of the one before, in words.
            lived: Seconds that it lived.

        Raises:
            SiteFailed: If no restart would help, with the operator's way out.
        """
        found = _problems(self.place)
        for what in ("certificate", "clock"):
            if what in found:
                raise SiteFailed(f"{said}: {found[what]}")
        now = time.monotonic()
        if "server" in found or lived > SHORT_SECONDS:
            self.first = None
            tell(f"{said}; it is started again" + (f" ({found['server']})" if found else ""))
        elif self.first is None:
            self.first = now
            tell(f"{said}: {_refused(self.place)}; it is tried again for {REFUSED_SECONDS:.0f} s")
        elif now - self.first > REFUSED_SECONDS:
            raise SiteFailed(f"{said}: {_refused(self.place)}")
        time.sleep(AGAIN_SECONDS)


def _refused(place: Place) -> str:
    return (
        f"{place.site.superlink.address} did not let this site in. Either its key is not registered there: send "
        f"{place.site.name}.pub to the coordinator. Or another SuperNode shows the same key, or did until it was "
        "killed less than a minute ago"
    )


def tell(line: str) -> None:
    """Prints a line for the site's operator."""
    print(f"fedsynth: {line}", file=sys.stderr, flush=True)


def watch(
    place: Place,
    warm: subprocess.Popen[bytes],
    supernode: subprocess.Popen[bytes],
    superexec: subprocess.Popen[bytes],
    port: int,
) -> tuple[str, float]:
    """Waits until SuperNode or SuperExec has ended or hangs; returns that in words, and the seconds since its start.

    Raises:
        SiteFailed: If the SuperNode lives but does not finish its start.
    """
    begun, started, told, looked, seen = time.monotonic(), 0.0, False, 0.0, 0.0
    read, changed = begun, source_changed(place)  # `site start` has reported it
    while supernode.poll() is None and superexec.poll() is None:
        if warm.poll() is not None and not told:
            tell(f"the warm process died ({ending(warm.returncode)}): each message now takes some seconds more")
            told = True
        now = time.monotonic()
        if now - read > READ_SECONDS:
            read, before = now, changed
            changed = source_changed(place)
            if changed and changed != before:
                tell(changed)
        if now - looked > LOOK_SECONDS:
            looked = now
            if not started and listens(supernode, port):  # it does so before it connects
                started = now
            seen = now if not started or _connected(supernode, port) else seen
        if not started and now - begun > place.site.start_seconds:
            raise SiteFailed(
                f"the SuperNode has not started after {now - begun:.0f} s (start_seconds of site.toml): "
                "wait until this machine is less busy, or raise that key"
            )
        if now - seen > SILENT_SECONDS:
            # If TLS is cut in its handshake, Flower gives up, and its process stays idle.
            if "server" not in _problems(place):
                return "the SuperNode lost its connection and does not try again", now - started
            seen = time.monotonic()
        time.sleep(0.2)
    who, code = ("SuperExec", superexec.poll()) if supernode.poll() is None else ("SuperNode", supernode.poll())
    return f"the {who} ended ({ending(code)})", time.monotonic() - started if started else 0.0


def _connected(supernode: subprocess.Popen[bytes], port: int) -> bool:
    """True if the process holds a connection that is not to its own port."""
    try:
        held = psutil.Process(supernode.pid).net_connections("tcp")
    except psutil.Error:
        return True  # it has ended, or this system does not say
    return any(each.raddr and each.laddr.port != port for each in held)


def _problems(place: Place) -> dict[str, str]:
    """The obstacle between this site and its server: `server`, `certificate` or `clock`, and a description."""
    return {finding.what: finding.says for finding in server(place) if finding.state == "problem"}
