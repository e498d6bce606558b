"""The sampler's state: slots, histories, biases, log-probabilities, and independence of batch mates."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestra.worker import sampling
from orchestra.worker.drawn import Packed
from orchestra.worker.plan import StepOutput
from orchestra.worker.sampler import Sampler
from tests.worker.plans import sampling_start

VOCAB = 64
SLOTS = 8
CPU = torch.device("cpu")


def make_sampler() -> Sampler:
    return Sampler(VOCAB, SLOTS, CPU)


def logits_favouring(*tokens: int) -> Tensor:
    """One row per token, each with its favourite, and the next ids right behind."""
    rows = torch.zeros(len(tokens), VOCAB)
    for row, token in enumerate(tokens):
        for place in range(4):
            rows[row, (token + place) % VOCAB] = 4.0 - place
    return rows


def sample(
    sampler: Sampler, logits: Tensor, slots: list[int], position: int = 0, top: int = -1
) -> StepOutput:
    positions = np.full(len(slots), position, np.int32)
    return sampler.draw(logits, np.array(slots, np.int32), positions, top).fetch()


def test_greedy_takes_the_first_of_equals() -> None:
    sampler = make_sampler()
    sampler.start([sampling_start(0)])
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 9]] = 1.0
    assert sample(sampler, logits, [0]).token_ids.tolist() == [5]


def test_tiny_temperature_is_greedy() -> None:
    sampler = make_sampler()
    sampler.start([sampling_start(0, temperature=1e-30)])
    assert sample(sampler, logits_favouring(7), [0]).token_ids.tolist() == [7]


def test_half_precision_logits_are_taken() -> None:
    sampler = make_sampler()
    sampler.start([sampling_start(0), sampling_start(1, temperature=1.0, top_k=1)])
    logits = logits_favouring(3, 4).bfloat16()
    output = sample(sampler, logits, [0, 1], top=2)
    assert output.token_ids.tolist() == [3, 4]
    assert output.top_ids.tolist() == [[3, 4], [4, 5]]


row_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, VOCAB, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "seed": st.integers(0, 2**64 - 1),
        "logit_bias": st.sampled_from([{}, {3: 5.0, 9: -2.0}]),
        "prompt_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=4),
    }
)


def start_of(slot: int, params: dict[str, Any]) -> Any:
    params = dict(params)
    bias = params.pop("logit_bias")
    return sampling_start(
        slot, logit_bias_ids=list(bias), logit_bias_values=list(bias.values()), **params
    )


@given(st.lists(row_params, min_size=2, max_size=SLOTS), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_nobody_draws_differently_in_company(rows: list[dict[str, Any]], seed: int) -> None:
    together = make_sampler()
    together.start([start_of(slot, params) for slot, params in enumerate(rows)])
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(rows), VOCAB, generator=generator) * 2 for _ in range(3)]
    slots = list(range(len(rows)))
    crowd = [sample(together, logits[p], slots, position=p).token_ids for p in range(3)]
    for slot, params in enumerate(rows):
        alone = make_sampler()
        alone.start([start_of(slot, params)])
        for position in range(3):
            row = logits[position][slot : slot + 1]
            assert sample(alone, row, [slot], position=position).token_ids == crowd[position][slot]


def test_drawn_tokens_join_the_history() -> None:
    sampler = make_sampler()
    sampler.start([sampling_start(3, frequency_penalty=1.5), sampling_start(1)])
    drawn = [sample(sampler, logits_favouring(10, 10), [3, 1]).token_ids.tolist() for _ in range(3)]
    # 4, 3, 2, 1 for tokens 10 to 13: each draw of one costs it 1.5.
    assert drawn == [[10, 10], [11, 10], [10, 10]]


def test_history_of_a_resumed_sequence_comes_with_its_start() -> None:
    resumed = sampling_start(
        0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        prompt_token_ids=[10],
        output_token_ids=[11, 11],
    )
    sampler = make_sampler()
    sampler.start([resumed])
    # 10: 4 / 2 = 2; 11: 3 / 2 - 0.5 = 1; 12: 2; the first of equals is 10.
    assert sample(sampler, logits_favouring(10), [0]).token_ids.tolist() == [10]
    # Now 10 is in the output too: 4 / 2 - 0.5 = 1.5, and 12 is the best.
    assert sample(sampler, logits_favouring(10), [0]).token_ids.tolist() == [12]


def test_slot_forgets_its_last_sequence() -> None:
    sampler = make_sampler()
    sampler.start(
        [sampling_start(0, frequency_penalty=2.0, logit_bias_ids=[20], logit_bias_values=[100.0])]
    )
    assert sample(sampler, logits_favouring(10), [0]).token_ids.tolist() == [20]
    sampler.start([sampling_start(0)])
    assert sample(sampler, logits_favouring(20), [0]).token_ids.tolist() == [20]
    sampler.start([sampling_start(0, frequency_penalty=2.0)])
    assert sample(sampler, logits_favouring(20), [0]).token_ids.tolist() == [20]


def test_histories_grow_with_the_sequences_that_need_them() -> None:
    sampler = make_sampler()
    for slot in range(SLOTS):
        sampler.start([sampling_start(slot, frequency_penalty=2.0)])
        assert sample(sampler, logits_favouring(slot), [slot]).token_ids.tolist() == [slot]
    everyone = list(range(SLOTS))
    again = sample(sampler, logits_favouring(*everyone), everyone).token_ids
    assert again.tolist() == [slot + 1 for slot in everyone]


def test_bias_can_forbid_and_force() -> None:
    sampler = make_sampler()
    sampler.start(
        [
            sampling_start(0, logit_bias_ids=[10], logit_bias_values=[-100.0]),
            sampling_start(1),
            sampling_start(2, temperature=1.0, logit_bias_ids=[33], logit_bias_values=[100.0]),
        ]
    )
    output = sample(sampler, logits_favouring(10, 10, 10), [0, 1, 2])
    assert output.token_ids.tolist() == [11, 10, 33]


def test_logprobs_are_the_models_own() -> None:
    sampler = make_sampler()
    sampler.start(
        [
            sampling_start(0, logit_bias_ids=[30], logit_bias_values=[50.0]),
            sampling_start(1, temperature=0.5, repetition_penalty=1.5, prompt_token_ids=[10]),
        ]
    )
    logits = logits_favouring(10, 10)
    output = sample(sampler, logits.clone(), [0, 1], top=3)
    expected = torch.log_softmax(logits, 1)
    for row, token in enumerate(output.token_ids):
        assert output.chosen_logprobs[row] == pytest.approx(float(expected[row, token]))
        assert output.top_ids[row].tolist() == [10, 11, 12]
        assert output.top_logprobs[row] == pytest.approx(expected[row, 10:13].numpy())
    assert output.token_ids[0] == 30


@pytest.mark.parametrize(("top", "chosen", "alternatives"), [(-1, 0, 0), (0, 2, 0), (4, 2, 8)])
def test_logprobs_have_the_size_that_was_asked_for(
    top: int, chosen: int, alternatives: int
) -> None:
    sampler = make_sampler()
    sampler.start([sampling_start(0), sampling_start(1)])
    output = sample(sampler, logits_favouring(1, 2), [0, 1], top=top)
    assert output.chosen_logprobs.size == chosen
    assert output.top_ids.size == output.top_logprobs.size == alternatives
    assert output.chosen_logprobs.dtype == output.top_logprobs.dtype == np.float32
    assert output.top_ids.dtype == output.token_ids.dtype == np.int32


# === what candidates do not reach ===

WIDE = 3000


def wide_logits() -> Tensor:
    """All but flat, and one row that is not: a nucleus of thousands beside one of a few."""
    logits = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(5)) * 0.1
    logits[1] *= 60
    return logits


def wide_starts() -> list[Any]:
    return [
        sampling_start(0, temperature=1.0, top_p=0.95, seed=1),
        sampling_start(1, temperature=1.0, top_p=0.9, seed=2),
        sampling_start(2, temperature=1.0, top_k=2000, seed=3, repetition_penalty=1.3),
    ]


def test_a_nucleus_beyond_the_candidates_is_drawn_from_whole() -> None:
    logits, slots = wide_logits(), np.arange(3, dtype=np.int32)
    steps = range(40)
    few, whole = Sampler(WIDE, 3, CPU), Sampler(WIDE, 3, CPU)
    for sampler in (few, whole):
        sampler.start(wide_starts())
    outputs = [few.draw(logits, slots, slots + step, 2).fetch() for step in steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", WIDE)
        expected = [whole.draw(logits, slots, slots + step, 2).fetch() for step in steps]
    for actual, wanted in zip(outputs, expected, strict=True):
        for name, values in vars(wanted).items():
            assert np.array_equal(getattr(actual, name), values), name
    probabilities = torch.softmax(logits, 1).sort(1, descending=True).values.cumsum(1)
    assert (probabilities[:, sampling.CANDIDATES - 1] > 0.95).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("starts", "fetches"),
    [
        pytest.param(wide_starts()[1:], 1, id="as many as top-k asks for are ranked at once"),
        pytest.param(wide_starts(), 2, id="a flat row is drawn again"),
        pytest.param([sampling_start(0), wide_starts()[2]], 1, id="greedy beside top-k"),
    ],
)
def test_results_come_in_one_piece(
    starts: list[Any], fetches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, fetched = Sampler(WIDE, 3, CPU), []
    sampler.start(starts)
    read = Packed.read

    def count(packed: Packed) -> StepOutput:
        fetched.append(packed.numbers.shape)
        return read(packed)

    monkeypatch.setattr(Packed, "read", count)
    slots = np.array([start.slot for start in starts], np.int32)
    sampler.draw(wide_logits()[slots], slots, slots, 3).fetch()
    assert fetched == [(len(starts), 1 + 1 + 3 + 3)] * fetches
