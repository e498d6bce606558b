"""What a rank's supervisor reads: one JSON object per line of standard output."""

import json


def write_status(status: str, **figures: int) -> None:
    """Says how far the rank is."""
    print(json.dumps({"status": status, **figures}), flush=True)
