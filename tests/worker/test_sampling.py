"""The sampling functions against transformers' processors, and the drawn tokens against their distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orchestra.worker import sampling
from orchestra.worker.sampler import Sampler
from tests.worker.plans import sampling_start

VOCAB = 300
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def kept_probabilities(logits: Tensor, **params: float) -> Tensor:
    """The distribution that one sampler row draws from."""
    rows = logits.shape[0]
    probabilities = torch.softmax(logits / params.get("temperature", 1.0), 1)
    top_k = torch.full((rows,), int(params.get("top_k", 0)) or logits.shape[1])
    top_p = torch.full((rows,), params.get("top_p", 1.0))
    threshold = sampling.rank_threshold(probabilities, top_k, top_p)
    floor = probabilities.amax(1, keepdim=True) * params.get("min_p", 0.0)
    kept = probabilities * (probabilities >= torch.maximum(threshold, floor))
    return kept / kept.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": VOCAB},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("candidates", [8, 1024], ids=["few candidates", "all candidates"])
def test_filters_agree_with_transformers(
    params: dict[str, float], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    warpers = LogitsProcessorList()
    if "temperature" in params:
        warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    logits = random_logits(16)
    expected = torch.softmax(warpers(torch.zeros((16, 1), dtype=torch.long), logits.clone()), 1)
    torch.testing.assert_close(kept_probabilities(logits, **params), expected, atol=1e-6, rtol=1e-4)


def test_top_p_of_a_flat_distribution_keeps_its_share() -> None:
    # Ties with the last kept token are kept: a flat distribution keeps all.
    assert (kept_probabilities(torch.zeros(1, VOCAB), top_p=0.5) > 0).all()


def test_repetition_penalty_agrees_with_transformers() -> None:
    logits = random_logits(3)
    prompt = torch.tensor([[1, 2, 3, 3], [4, 5, 6, 7], [1, 1, 1, 1]])
    output = torch.tensor([[9, 9], [10, 11], [1, 2]])
    seen = torch.zeros((3, VOCAB), dtype=torch.bool).scatter_(1, prompt, value=True)
    counts = torch.zeros((3, VOCAB), dtype=torch.int32)
    counts.scatter_add_(1, output, torch.ones_like(output, dtype=torch.int32))
    penalties = torch.tensor([[1.3, 0.0, 0.0]]).repeat(3, 1)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat([prompt, output], 1), logits.clone())
    actual = sampling.apply_penalties(logits, seen, counts, penalties)
    torch.testing.assert_close(actual, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros((1, 8))
    prompt = torch.zeros((1, 8), dtype=torch.bool)
    prompt[0, 1] = True
    counts = torch.tensor([[0, 0, 1, 3, 0, 0, 0, 0]], dtype=torch.int32)
    actual = sampling.apply_penalties(logits, prompt, counts, torch.tensor([[1.0, 0.5, 0.25]]))
    assert actual.tolist() == [[0.0, 0.0, -0.75, -1.75, 0.0, 0.0, 0.0, 0.0]]


# === the random numbers ===


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_numbers_are_in_range_and_depend_on_nothing_else(seed: int, position: int) -> None:
    alone = sampling.uniforms(np.array([seed], np.uint64), np.array([position]))
    crowd = sampling.uniforms(np.array([7, seed, 9], np.uint64), np.array([1, position, 1]))
    assert 0.0 <= alone[0] < 1.0
    assert alone[0] == crowd[1]


def test_numbers_are_the_same_for_ever() -> None:
    # A seed that a user noted must give the same text after an upgrade.
    seeds, positions = [0, 0, 1, 2**64 - 1], [0, 1, 0, 5]
    numbers = sampling.uniforms(np.array(seeds, np.uint64), np.array(positions))
    assert numbers.tolist() == [split_mix(*pair) for pair in zip(seeds, positions, strict=True)]
    assert numbers[0] == 0.6524484863740321


def split_mix(seed: int, position: int) -> float:
    """The generator as its paper writes it, entered at the given place of the seed's stream."""

    def output(state: int) -> int:
        z = state & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    first = output(seed + GOLDEN)
    return (output(first + (position + 1) * GOLDEN) >> 12) / 2**52


@pytest.mark.parametrize("axis", ["positions of one seed", "seeds at one position", "diagonal"])
def test_numbers_are_uniform(axis: str) -> None:
    count = np.arange(20_000)
    seeds = count if axis != "positions of one seed" else np.full_like(count, 42)
    positions = count if axis != "seeds at one position" else np.full_like(count, 17)
    numbers = sampling.uniforms(seeds.astype(np.uint64), positions)
    observed, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert chi_square(observed, np.full(100, 200.0)) < CHI_SQUARE_99
    pairs, _, _ = np.histogram2d(numbers[:-1], numbers[1:], bins=10, range=((0, 1), (0, 1)))
    assert chi_square(pairs.ravel(), np.full(100, 199.99)) < CHI_SQUARE_99


# 99 degrees of freedom: exceeded by chance once in 100,000 draws.
CHI_SQUARE_99 = 170.0


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


# === the draw ===


def test_draw_inverts_the_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-52]
    drawn = [
        int(sampling.draw(probabilities, torch.tensor([number], dtype=torch.float64)))
        for number in numbers
    ]
    assert drawn == [1, 1, 3, 3, 4, 4]


@given(st.integers(1, 5), st.integers(1, 2000), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_draw_finds_what_a_search_of_all_sums_finds(rows: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(torch.randn(rows, vocab, generator=generator) * 4, 1)
    probabilities.mul_(torch.rand(rows, vocab, generator=generator) > 0.3)
    probabilities[:, -1] += 0.1
    numbers = torch.rand(rows, dtype=torch.float64, generator=generator)
    sums = probabilities.cumsum(1, dtype=torch.float64)
    expected = torch.searchsorted(sums, numbers.unsqueeze(1) * sums[:, -1:], right=True)
    # What the two add up in another order is less than the probability of hitting such a place.
    assert sampling.draw(probabilities, numbers).tolist() == expected.flatten().tolist()


@given(st.integers(1, 5), st.integers(1, 2000), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_first_of_the_likeliest_is_found(
    rows: int, vocab: int, is_half: bool, seed: int
) -> None:
    logits = random_logits(rows, vocab + 3, seed).round(decimals=1)
    logits[:, ::3] = -torch.inf
    logits = logits.bfloat16() if is_half else logits
    # Every other kind of row: with gaps between them.
    cut = logits[:, :vocab]
    expected = cut.float().numpy().argmax(1)
    assert sampling.argmax(cut).tolist() == expected.tolist()
    assert sampling.argmax(cut[-1:].contiguous()).tolist() == expected[-1:].tolist()


def test_what_is_no_number_is_not_the_likeliest() -> None:
    row = torch.full((1, 300), -torch.inf)
    assert sampling.argmax(row).tolist() == [0]
    row[0, :290] = torch.nan
    row[0, 297] = -1.0
    assert sampling.argmax(row).tolist() == [297]
    assert sampling.argmax(torch.full((1, 9), torch.nan)).tolist() == [0]


@given(st.integers(1, 5), st.integers(1, 2000), st.floats(0.05, 20), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_softmax_agrees_with_torch(rows: int, vocab: int, temperature: float, seed: int) -> None:
    logits = random_logits(rows, vocab, seed)
    logits[:, ::3] = -torch.inf
    logits[:, -1] = 1.0
    temperatures = torch.linspace(temperature, 2 * temperature, rows)
    expected = torch.softmax(logits.double() / temperatures.double().unsqueeze(1), 1)
    probabilities = sampling.softmax(logits, temperatures)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-4, atol=1e-7)
    assert (probabilities[logits == -torch.inf] == 0).all()
    alone = sampling.softmax(logits[-1:], temperatures[-1:])
    assert torch.equal(alone, probabilities[-1:])
    half = torch.cat([logits, logits], 1).bfloat16()[:, :vocab]
    of_half = sampling.softmax(half, temperatures)
    assert torch.equal(of_half, sampling.softmax(half.float().contiguous(), temperatures))


@given(st.integers(0, 2**32), st.floats(0, 1 - 2.0**-52))
@settings(max_examples=50, deadline=None)
def test_draw_never_takes_an_impossible_token(seed: int, number: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(torch.randn(1, 50, generator=generator) * 20, 1)
    probabilities.mul_(torch.rand(1, 50, generator=generator) > 0.5)
    if probabilities.sum() == 0:
        return
    token = int(sampling.draw(probabilities, torch.tensor([number], dtype=torch.float64)))
    assert probabilities[0, token] > 0


def test_draw_of_nothing_that_is_a_number_is_a_token() -> None:
    drawn = sampling.draw(torch.full((1, 5), torch.nan), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(drawn) < 5


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 30},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.02, "top_p": 0.98, "top_k": 100},
    ],
    ids=str,
)
def test_tokens_follow_the_distribution(params: dict[str, float]) -> None:
    rows, rounds = 64, 200
    logits = random_logits(1).expand(rows, -1)
    expected = kept_probabilities(logits[:1], **params)[0].numpy()
    sampler = Sampler(VOCAB, rows, CPU)
    sampler.start([sampling_start(slot, seed=slot * 977, **params) for slot in range(rows)])
    slots = np.arange(rows, dtype=np.int32)
    counts = np.zeros(VOCAB)
    for position in range(rounds):
        output = sampler.draw(logits, slots, np.full(rows, position, np.int32), -1).fetch()
        counts += np.bincount(output.token_ids, minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    # Rare tokens together, so that every cell expects enough for the test to hold.
    total = rows * rounds
    common = expected * total >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * total
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = len(observed) - 1
    # Mean and spread of chi-square; five spreads above is one chance in a million.
    assert chi_square(observed, wanted) < degrees + 5 * np.sqrt(2 * degrees)
