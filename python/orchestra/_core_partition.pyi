"""The division of layers by `_core`. For type checkers alone: there is no such module at run time."""

from collections.abc import Sequence

def plan_layer_move(
    layers: Sequence[tuple[int, int]],
    stages: Sequence[tuple[int, int, int, int]],
    terms: tuple[int, int, int, int],
) -> tuple[list[int], int, int, int] | None:
    """How the layers of a model are to be divided among the stages of a pipeline, where moving them pays.

    Args:
        layers: Of each layer its work in proportion to the others, and its bytes: weights and KV.
        stages: Of each stage its number of layers, the nanoseconds that it computes of a step, its work beside the
            layers, and the bytes that it could take.
        terms: Steps in flight, bytes that are brought over in a second, seconds that the load is taken to stay as it
            is, and the least gain in percent of the time between two steps.

    Returns:
        The layers of each stage, the nanoseconds between two steps now and then, and the bytes to bring over; None
        where everything should stay.

    Raises:
        InvalidRequestError: A number is out of range, or the stages do not have the layers; `key` names it.
    """
