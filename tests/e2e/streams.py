"""Streamed completions that are read while something happens to their workers."""

import json
import threading
import urllib.request
from collections.abc import Sequence

from tests.e2e.stack import Serve, eventually


class Stream(threading.Thread):
    """A streamed greedy completion, read as it comes.

    Args:
        serve: where it is asked for.
        prompt: text, or token ids.
        max_tokens: as many come.
    """

    def __init__(self, serve: Serve, prompt: str | Sequence[int], max_tokens: int) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        body = {"model": serve.model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        self._request = urllib.request.Request(
            f"{serve.url}/v1/completions",
            json.dumps({**body, "ignore_eos": True, "temperature": 0}).encode(),
            {"content-type": "application/json"},
        )
        self.start()

    def run(self) -> None:
        """Reads to the end."""
        with urllib.request.urlopen(self._request, timeout=120) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data: ")
                if event.startswith("{"):
                    (choice,) = json.loads(event)["choices"]
                    self.texts.append(choice["text"])
                    self.finish_reason = choice["finish_reason"]

    def answer(self) -> str:
        """All of its text, which has to have come to its end."""
        self.join(120)
        assert not self.is_alive()
        assert self.finish_reason == "length"
        return "".join(self.texts)


def wait_for_the_middle(streams: Sequence[Stream]) -> None:
    """Until every stream has begun; none has ended then."""
    eventually(lambda: all(len(stream.texts) > 10 for stream in streams))
    assert all(stream.is_alive() for stream in streams)
