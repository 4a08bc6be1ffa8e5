"""A recording in Perfetto's own format, protocol buffers, which ui.perfetto.dev opens."""

import itertools
from functools import partial
from typing import Any

from apt_model.core.errors import MissingExtraError
from apt_model.vgpu.recorder import Edge, Recorder

_SEQUENCE = 1  # of packets: there is one writer


def builder() -> Any:
    """What packets are added to; `MissingExtraError` without the package."""
    try:
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("VGPUStack.trace", "perfetto", "trace") from error
    return TraceProtoBuilder()


def packed(recorder: Recorder, made: Any) -> bytes:
    """The bytes of a file: a track a lane and a counter, then every edge and count in order of time."""
    tracks = _Tracks(made)
    events = []
    for name, edges in recorder.lanes():
        number = tracks.add(name)
        events += [(edge.at_ns, partial(_edge, number, edge)) for edge in edges]
    for name, values in recorder.counts.items():
        number = tracks.add(name, unit="bytes")
        events += [(at_ns, partial(_count, number, value)) for at_ns, value in values]
    for at_ns, fill in sorted(events, key=lambda each: each[0]):  # stable: a lane's edges stay in their order
        packet = made.add_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = at_ns, _SEQUENCE
        fill(packet.track_event)
    data: bytes = made.serialize()
    return data


class _Tracks:
    """Tracks below one root, shown in the order in which they are added."""

    def __init__(self, made: Any) -> None:
        self._made, self._numbers = made, itertools.count(1)
        root = made.add_packet().track_descriptor
        root.uuid, root.name, root.child_ordering = next(self._numbers), "VGPU stack", root.EXPLICIT
        self._root = root.uuid

    def add(self, name: str, unit: str | None = None) -> int:
        """Its number; with a unit it is a counter."""
        track = self._made.add_packet().track_descriptor
        track.uuid = track.sibling_order_rank = next(self._numbers)
        track.name, track.parent_uuid = name, self._root
        if unit is not None:
            track.counter.unit_name = unit
        number: int = track.uuid
        return number


def _edge(track: int, edge: Edge, event: Any) -> None:
    event.track_uuid = track
    if edge.name is None:
        event.type = event.TYPE_SLICE_END
        return
    event.type, event.name = event.TYPE_SLICE_BEGIN, edge.name
    for name, value in edge.said.items():
        said = event.debug_annotations.add()
        said.name, said.int_value = name, value


def _count(track: int, value: int, event: Any) -> None:
    event.track_uuid, event.type, event.counter_value = track, event.TYPE_COUNTER, value
