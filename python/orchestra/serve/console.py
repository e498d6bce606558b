"""What `orchestra serve` shows: permanent lines, and one progress line that a terminal redraws."""

from typing import TextIO


class Console:
    """Writes lines for a person. Where nobody reads any more (a closed pipe), it falls silent.

    Args:
        stream: where to write. On a terminal the progress line is redrawn in place, elsewhere each change of its
            text is a line of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._progress = ""

    def line(self, text: str) -> None:
        """Writes a permanent line; a progress line stays below it."""
        if self._is_terminal and self._progress:
            self._write(f"\r\x1b[K{text}\n{self._progress}")
        else:
            self._write(f"{text}\n")

    def progress(self, text: str) -> None:
        """Replaces the progress line; an empty text removes it."""
        if text == self._progress:
            return
        self._progress = text
        if self._is_terminal:
            self._write(f"\r\x1b[K{text}")
        elif text:
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            # Serving goes on without a reader. ValueError: the stream was closed.
            return
