"""How logits become one token: pure functions over a batch, each row on its own.

The order is: bias, penalties, temperature, top-k, top-p, min-p, draw. No row's result depends on another row.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra import _core
from orchestra.worker.row_kernels import KERNEL_DTYPES

# Tokens that top-k and top-p look at first. Rows that keep more are ranked whole.
CANDIDATES = 1024

_U64 = np.uint64
_TOKEN_MASK = 0xFFFFFFFF


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): the same on every machine, whatever else is drawn.

    The generator is SplitMix64, entered at `position` of the stream that the mixed seed names.

    Args:
        seeds: `[N]`.
        positions: `[N]`, of the tokens to draw.
    """
    golden = _U64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        # Mixed once first: neighbouring seeds would else share their streams, shifted.
        stream = _mix(seeds + golden)
        bits = _mix(stream + golden * (positions.astype(_U64) + _U64(1)))
    # 52 bits, so that no product with a sum of probabilities rounds up to the sum.
    return (bits >> _U64(12)).astype(np.float64) * 2.0**-52


def apply_penalties(logits: Tensor, prompt: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Makes tokens that came before less likely (or more).

    Args:
        logits: `float32[N, V]`.
        prompt: `bool[N, V]`, whether the token is in the prompt.
        counts: `int32[N, V]`, how often the token is in the output.
        penalties: `float32[N, 3]`: repetition (of prompt and output), frequency and presence (of the output).
    """
    repetition, frequency, presence = (column.unsqueeze(1) for column in penalties.unbind(1))
    is_in_output = counts > 0
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt | is_in_output, scaled, logits)
    return logits - frequency * counts - presence * is_in_output


def argmax(logits: Tensor) -> Tensor:
    """The most likely token of each row (`[N, V]`, of any float dtype), the first of equals; `int64[N]`."""
    return likeliest_of(candidates(logits, 0)) if _suits_kernels(logits) else logits.argmax(1)


def candidates(logits: Tensor, first: int) -> Tensor:
    """The most likely token of each row among some of the vocabulary, to be compared by `likeliest_of`.

    Args:
        logits: `[N, C]` of these tokens, of any float dtype.
        first: the token of the first column.

    Returns:
        `int64[N, 1]`: the place of the token's logit among all numbers in the high half, so that the largest candidate
        has the largest logit; and the complement of the token in the low half, so that it is the first of equals.
    """
    rows, columns = logits.shape
    if columns == 0:
        return torch.full((rows, 1), torch.iinfo(torch.int64).min, device=logits.device)
    if not _suits_kernels(logits):
        tokens = logits.argmax(1, keepdim=True)
        # Zeros are equal, whatever their sign.
        bits = logits.gather(1, tokens).float().add_(0.0).view(torch.int32)
        order = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
        return (order.long() << 32) + (_TOKEN_MASK - first - tokens)
    found = logits.new_empty(rows, 1, dtype=torch.int64)
    _core.candidates(
        *(KERNEL_DTYPES[logits.dtype], (rows, columns)),
        *((logits.data_ptr(), logits.stride(0)), first),
        *(found.data_ptr(), torch.get_num_threads()),
    )
    return found


def likeliest_of(candidates: Tensor) -> Tensor:
    """The tokens (`int64[N]`) of the best of some `candidates` (`int64[N, any]`)."""
    if candidates.device.type != "cpu":
        return _TOKEN_MASK - (candidates.amax(1) & _TOKEN_MASK)
    candidates = candidates.contiguous()
    rows, each = candidates.shape
    tokens = candidates.new_empty(rows)
    _core.likeliest_of((rows, each), candidates.data_ptr(), tokens.data_ptr())
    return tokens


def rank_threshold(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least probability that top-k and top-p keep; what ties with it is kept too.

    Top-p counts among what top-k keeps, and keeps the fewest tokens that reach it.

    Args:
        probabilities: `float32[N, V]`.
        top_k: `int64[N]`, 1 to V; V keeps all.
        top_p: `float32[N]`, above 0; 1 or more keeps all.

    Returns:
        `float32[N, 1]`.
    """
    vocab = probabilities.shape[1]
    count = min(CANDIDATES, int(top_k.max()))
    threshold, is_found = threshold_among(probabilities, top_k, top_p, count)
    wide = torch.nonzero(~is_found).flatten()
    if wide.numel() and count < vocab:
        found, _ = threshold_among(probabilities[wide], top_k[wide], top_p[wide], vocab)
        threshold[wide] = found
    return threshold


def threshold_among(
    probabilities: Tensor, top_k: Tensor, top_p: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`rank_threshold` by the `count` most likely tokens, and whether they were enough (`bool[N]`).

    Unlike that function it waits for nothing that a GPU computes: it is for the caller to look.
    """
    vocab = probabilities.shape[1]
    ranked = _largest(probabilities, count)
    is_in_top_k = torch.arange(count, device=ranked.device) < top_k.unsqueeze(1)
    reached = ranked.mul(is_in_top_k).cumsum(1, dtype=torch.float64)
    keeps_all = top_k == vocab
    total = torch.where(keeps_all, 1.0, reached[:, -1])
    # A bound that is never reached where all are to be kept: the sum may round to less than 1.
    bound = torch.where(top_p < 1, top_p * total, torch.inf)
    # The first token is always kept; each further one while those before it have not reached the bound.
    kept = 1 + torch.searchsorted(reached, bound.unsqueeze(1))
    kept = torch.minimum(kept, top_k.clamp(max=count).unsqueeze(1))
    is_found = (top_k <= count) | (keeps_all & (reached[:, -1] >= bound))
    return ranked.gather(1, kept - 1), is_found


def softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Probabilities of logits that are divided by their row's temperature first.

    Args:
        logits: `[N, V]`, of any float dtype.
        temperatures: `float32[N]`, above 0.

    Returns:
        `float32[N, V]`
    """
    if not _suits_kernels(logits):
        return torch.softmax(logits.float() / temperatures.unsqueeze(1), 1)
    probabilities = torch.empty(logits.shape, dtype=torch.float32)
    _core.softmax(
        *(KERNEL_DTYPES[logits.dtype], (logits.shape[0], logits.shape[1])),
        (logits.data_ptr(), logits.stride(0)),
        *(temperatures.data_ptr(), probabilities.data_ptr(), torch.get_num_threads()),
    )
    return probabilities


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Inverts the distribution function, tokens in the order of their ids.

    Args:
        probabilities: `float32[N, V]`, not necessarily of sum 1.
        numbers: `float64[N]` in [0, 1).

    Returns:
        `int64[N]` token ids, never one of probability 0.
    """
    if probabilities.device.type == "cpu":
        probabilities = probabilities.contiguous()
        tokens = torch.empty(len(numbers), dtype=torch.int64)
        _core.draw(
            *((probabilities.shape[0], probabilities.shape[1]), probabilities.data_ptr()),
            *(numbers.data_ptr(), tokens.data_ptr(), torch.get_num_threads()),
        )
        return tokens
    # In double precision: the sum of 100,000 small terms must not lose the last of them.
    cumulated = probabilities.cumsum(1, dtype=torch.float64)
    targets = numbers.unsqueeze(1) * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
    # Only probabilities that are not numbers get past the end; the token is then arbitrary, but it exists.
    return drawn.clamp_(max=probabilities.shape[1] - 1)


def _suits_kernels(logits: Tensor) -> bool:
    is_known = logits.device.type == "cpu" and logits.dtype in KERNEL_DTYPES
    return is_known and logits.stride(1) == 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest values of each row, largest first."""
    if values.device.type != "cpu":
        return values.topk(count).values
    # numpy's partition and sort are vectorised: ten times as fast as torch's.
    array = values.numpy()
    rest = array.shape[1] - count
    if rest:
        array = np.partition(array, rest, axis=1)[:, rest:]
    return torch.from_numpy(np.sort(array, axis=1)[:, ::-1].copy())
