"""`orchestra-router` against other routers in front of the same mock engines, interleaved in one run."""
