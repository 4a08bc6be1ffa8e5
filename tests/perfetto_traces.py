"""Traces of a stack, read back with Perfetto's own classes."""

import itertools
from collections import defaultdict
from typing import NamedTuple

import pytest


class Shown(NamedTuple):
    """A slice of a file, and how many are around it."""

    begin: int
    end: int
    name: str
    said: dict
    depth: int


def read(path):
    """Slices and counter values by the name of their track; times must be monotone, and slices closed."""
    proto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    trace = proto.Trace()
    trace.ParseFromString(path.read_bytes())
    names = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    assert [names[1].name, names[1].child_ordering] == ["VGPU stack", proto.TrackDescriptor.EXPLICIT]
    slices, counters, inside = defaultdict(list), defaultdict(list), defaultdict(list)
    last = 0
    for packet in trace.packet:
        if not packet.HasField("track_event"):
            continue
        event, track = packet.track_event, names[packet.track_event.track_uuid].name
        assert packet.timestamp >= last
        assert packet.trusted_packet_sequence_id
        last = packet.timestamp
        if event.type == proto.TrackEvent.TYPE_COUNTER:
            assert names[event.track_uuid].counter.unit_name == "bytes"
            counters[track].append(event.counter_value)
        elif event.type == proto.TrackEvent.TYPE_SLICE_BEGIN:
            said = {each.name: each.int_value for each in event.debug_annotations}
            inside[track].append((packet.timestamp, event.name, said))
        else:
            assert event.type == proto.TrackEvent.TYPE_SLICE_END
            begin, name, said = inside[track].pop()
            slices[track].append(Shown(begin, packet.timestamp, name, said, len(inside[track])))
    assert not any(inside.values())
    return slices, counters


def follow_each_other(slices):
    return not any(each.depth for each in slices) and all(a.end <= b.begin for a, b in itertools.pairwise(slices))


def arrived(slices, stack):
    """Bytes that the lanes of each level show."""
    return [
        sum(each.said["bytes"] for each in slices[f"to level {number} ({level.config.device})"])
        for number, level in enumerate(stack.levels, 1)
    ]
