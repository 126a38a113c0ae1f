"""All contestants by name, and how a command line picks among them."""

from __future__ import annotations

from benchmarks.gpu import gemlite_peer, native_peers, peers, qhub_contestants
from benchmarks.gpu.case import Contestant

__all__ = ["ALL", "chosen"]

ALL: dict[str, Contestant] = {
    one.name: one for module in (peers, native_peers, gemlite_peer, qhub_contestants) for one in module.CONTESTANTS
}


def chosen(text: str) -> list[Contestant]:
    """Return the contestants of ``"all"``, ``"peers"``, ``"qhub"``, names and groups with commas; ``-name`` leaves out.

    The order is that of :data:`ALL`. Raises ValueError for an unknown word.
    """
    names: set[str] = set()
    for word in text.split(","):
        plain = word.removeprefix("-")
        found = {
            name for name, one in ALL.items() if plain in ("all", name, one.group, "peers" if one.peer else "qhub")
        }
        if not found:
            raise ValueError(f"no contestant or group {plain!r}; there are {sorted(ALL)}")
        names = names - found if word.startswith("-") else names | found
    return [one for name, one in ALL.items() if name in names]
