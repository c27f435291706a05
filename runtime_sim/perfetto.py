"""Perfetto's binary trace format: the few messages of its `trace.proto` that a timeline needs, written one by one.

Names are sent once and then referred to by number, so that a span costs some tens of bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

_SEQUENCE = 1
_BEGIN, _END, _COUNTER = 1, 2, 4  # TrackEvent.Type
_STATE_CLEARED, _STATE_NEEDED = 1, 2  # TracePacket.SequenceFlags
_EXPLICIT = 3  # TrackDescriptor.ChildTracksOrdering


def varint(value: int) -> bytes:
    """Base-128 encoding; negative numbers as 64 bits."""
    if 0 <= value < len(_SHORT):
        return _SHORT[value]
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SHORT = [bytes([v]) if v < 128 else bytes([v & 127 | 128, v >> 7]) for v in range(1 << 14)]


def number(field: int, value: int) -> bytes:
    """An integer or enumeration field."""
    return varint(field << 3) + varint(value)


def fixed64(field: int, value: int) -> bytes:
    """A fixed64 field."""
    return varint(field << 3 | 1) + value.to_bytes(8, "little")


def double(field: int, value: float) -> bytes:
    """A double field."""
    return varint(field << 3 | 1) + struct.pack("<d", value)


def nested(field: int, content: bytes) -> bytes:
    """A message, string or bytes field."""
    return varint(field << 3 | 2) + varint(len(content)) + content


_HEAD = number(10, _SEQUENCE) + number(13, _STATE_NEEDED)
_TIME = varint(8 << 3)


class PerfettoFile:
    """Packets of one trusted sequence, written as they come. Times are nanoseconds; tracks are numbers above 0."""

    def __init__(self, file: BinaryIO, category: str) -> None:
        self.file = file
        self.names: dict[str, int] = {}
        self.keys: dict[str, int] = {}
        self.texts: dict[str, int] = {}
        self._fresh = b""
        self._first = True
        self._category = category
        self._encoded: dict[int, tuple[dict[str, Any], bytes]] = {}
        self._ends: dict[int, tuple[bytes, bytes]] = {}

    def process(self, track: int, pid: int, name: str) -> None:
        """A group of lanes, shown in the order given by `lane`."""
        described = nested(3, number(1, pid) + nested(6, name.encode()))
        self._packet(nested(60, number(1, track) + described + number(11, _EXPLICIT)))

    def lane(self, track: int, process: int, name: str, rank: int) -> None:
        """A lane of spans."""
        self._packet(nested(60, number(1, track) + nested(2, name.encode()) + number(5, process) + number(12, rank)))

    def counter_track(self, track: int, process: int, name: str, measure: str) -> None:
        """A counter in units of `measure`."""
        described = nested(8, nested(6, measure.encode()))
        self._packet(nested(60, number(1, track) + nested(2, name.encode()) + number(5, process) + described))

    def counter(self, track: int, time: int, value: float) -> None:
        """The value of a counter from a time on."""
        event = number(9, _COUNTER) + number(11, track) + double(44, value)
        self._packet(number(8, time) + nested(11, event))

    def span(
        self,
        track: int,
        name: str,
        begin: int,
        end: int,
        arguments: dict[str, Any],
        sends: Sequence[int],
        receives: Sequence[int],
    ) -> None:
        """A span with its arguments; sends and receives: arrows that start and end here."""
        ends = self._ends.get(track)
        if ends is None:  # what every begin and every end of a lane starts with
            begins = number(9, _BEGIN) + number(11, track)
            ends = self._ends[track] = (begins, nested(11, number(9, _END) + number(11, track)))
        event = ends[0] + self._content(name, arguments)
        if sends or receives:
            event += b"".join([fixed64(47, i) for i in sends] + [fixed64(48, i) for i in receives])
        self._packet(_TIME + varint(begin) + nested(11, event))
        self._packet(_TIME + varint(end) + ends[1])

    def _content(self, name: str, arguments: dict[str, Any]) -> bytes:
        """Name, category and arguments of a span. Units that do the same share arguments, which are encoded once."""
        known = self._encoded.get(id(arguments))
        if known is not None:
            return known[1]
        event = number(10, self._known(self.names, 2, name)) + number(3, 1)
        for key, value in arguments.items():
            note = number(1, self._known(self.keys, 3, key))
            if isinstance(value, float):
                note += double(5, value)
            elif isinstance(value, int):
                note += number(4, value)
            else:
                note += number(17, self._known(self.texts, 29, str(value)))
            event += nested(4, note)
        self._encoded[id(arguments)] = (arguments, event)  # which keeps the id taken
        return event

    def _known(self, table: dict[str, int], field: int, text: str) -> int:
        """The number of a text, which is announced with the next packet if it is new."""
        found = table.get(text)
        if found is None:
            found = table[text] = len(table) + 1
            self._fresh += nested(field, number(1, found) + nested(2, text.encode()))
        return found

    def _packet(self, content: bytes) -> None:
        head = _HEAD
        if self._first:
            self._first = False
            head = number(10, _SEQUENCE) + number(13, _STATE_NEEDED | _STATE_CLEARED)
            self._fresh += nested(1, number(1, 1) + nested(2, self._category.encode()))
        if self._fresh:
            head += nested(12, self._fresh)
            self._fresh = b""
        self.file.write(nested(1, head + content))
