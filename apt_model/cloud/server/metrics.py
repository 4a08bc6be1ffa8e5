"""Counts for Prometheus. Labels are the server's own words: a model it holds, a status; never a client's text."""

import threading
from collections import Counter

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What happened since the start."""

    content_type = _TEXT

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self.inflight = self.reading = 0
        self.received = self.sent = self.repeated = 0

    def answered(self, model: str, status: int, seconds: float) -> None:
        """One request has its answer; `model` is "" where none that is held was named."""
        with self._lock:
            self._requests[model, status] += 1
            self._seconds[model] += seconds  # type: ignore[assignment] # a float in a Counter
            self._answers[model] += 1

    def text(self) -> str:
        """All of it."""
        with self._lock:
            lines = [
                _head("apt_requests_total", "counter"),
                *(
                    f'apt_requests_total{{model="{model}",status="{status}"}} {count}'
                    for (model, status), count in sorted(self._requests.items())
                ),
                _head("apt_request_seconds", "summary"),
            ]
            for model in sorted(self._answers):
                lines.append(f'apt_request_seconds_sum{{model="{model}"}} {self._seconds[model]:.6f}')
                lines.append(f'apt_request_seconds_count{{model="{model}"}} {self._answers[model]}')
            for name, kind, value in (
                ("apt_received_bytes_total", "counter", self.received),
                ("apt_sent_bytes_total", "counter", self.sent),
                ("apt_repeated_total", "counter", self.repeated),
                ("apt_inflight", "gauge", self.inflight),
                ("apt_reading", "gauge", self.reading),
            ):
                lines += [_head(name, kind), f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> str:
    return f"# TYPE {name} {kind}"
