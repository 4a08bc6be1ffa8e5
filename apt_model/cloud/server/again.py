"""A short forward that is asked for again and again, of which only the id and the numbers change.

What is looked at and made for such a request is the same each time, and takes longer than its product. So it is kept,
with the memory that the input stands in. One thread alone may use it: the one that answers at once.
"""

from apt_model.cloud.server.answers import Answer
from apt_model.cloud.server.compute import is_view
from apt_model.cloud.server.models import Model
from apt_model.cloud.tensors import as_tensor, data_of
from apt_model.cloud.wire import Layout, Message, joined

_MOST = 64  # of one model


class Again:
    """One model's forwards of one layout.

    Args:
        model: what computes.
        layout: of the requests: one tensor, of floats.
        identity: of a request that was answered.
        text: the answer's JSON.
    """

    def __init__(self, model: Model, layout: Layout, identity: str, text: bytes) -> None:
        self._forward = model.block.forward
        self._room = memoryview(bytearray(layout.nbytes))
        (x,) = layout.message(None, self._room).tensors
        self._inputs = {x.name: as_tensor(x)}  # over the room: floats at its beginning are not copied
        before, named, after = text.partition(b'"id":"%s"' % identity.encode())
        assert named, "an answer has its request's id"
        self._before, self._after = before + b'"id":"', b'"' + after.rstrip(b" ")

    def answer(self, identity: str, data: memoryview) -> Answer:
        """The answer to a request with this id and these bytes. It must be sent before the next one is asked for."""
        self._room[:] = data
        y = self._forward(self._inputs)
        return joined(self._before + identity.encode() + self._after, [data_of(y)])


def keep(model: Model, message: Message, answer: Answer) -> None:
    """Keep what was made for a forward that was answered; a model's are forgotten when there are too many."""
    layout, identity = message.layout, message.id
    if layout is None or identity is None or not (layout.is_known and is_view(message)):
        return
    if len(model.again) >= _MOST:
        model.again.clear()
    model.again[layout] = Again(model, layout, identity, bytes(answer[0][0]))
