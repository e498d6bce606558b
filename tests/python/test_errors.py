"""The exceptions: complete, alike in Rust and Python, and carrying their numbers."""

import pickle
import re
from pathlib import Path

import pytest

from orchestra import Scheduler, _core, errors

ROOT = Path(__file__).parents[2]
CATALOGUE = _core.error_codes()


def test_every_code_of_the_core_has_its_class() -> None:
    assert list(errors.BY_CODE) == [code for code, _, _ in CATALOGUE]
    for code, class_name, retryable in CATALOGUE:
        error = errors.BY_CODE[code]
        assert error is getattr(errors, class_name)
        assert error.code == code
        assert error.retryable is retryable
        assert class_name in errors.__all__


def test_the_documented_table_is_the_catalogue() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \| (\w+)", page, re.MULTILINE)
    assert [(code, name) for code, name, _ in rows] == [(code, name) for code, name, _ in CATALOGUE]
    documented = {code: retry == "yes" for code, _, retry in rows}
    assert documented == {code: retryable for code, _, retryable in CATALOGUE}


@pytest.mark.parametrize("error", errors.BY_CODE.values(), ids=lambda error: error.code)
def test_errors_survive_pickling(error: type[errors.OrchestraError]) -> None:
    raised = error("what happened", limit=3, current=4, worker_id="w", key="k", retry_after_ms=5)
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert str(copy) == "what happened"
    assert vars(copy) == vars(raised)


def test_built_in_parents_are_where_python_users_look() -> None:
    assert issubclass(errors.InvalidRequestError, ValueError)
    assert issubclass(errors.ContextTooLongError, errors.InvalidRequestError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.DeadlineExceededError, TimeoutError)


def test_numbers_come_as_attributes() -> None:
    scheduler = Scheduler({"max_num_workers": 1})
    scheduler.add_worker("w", model="m", num_blocks=4, max_model_len=1000)
    with pytest.raises(errors.ContextTooLongError) as too_long:
        scheduler.route(range(100), model="m")
    assert (too_long.value.current, too_long.value.limit) == (8, 4)

    with pytest.raises(errors.OverloadedError) as full:
        scheduler.add_worker("v", model="m", num_blocks=4, max_model_len=1000)
    assert (full.value.current, full.value.limit) == (1, 1)

    with pytest.raises(errors.WorkerFailedError) as failed:
        scheduler.kv_stored("w", [1, 2, 3, 4, 5])
    assert failed.value.worker_id == "w"

    with pytest.raises(errors.InvalidRequestError) as invalid:
        scheduler.route([], model="m")
    assert invalid.value.key == "token_ids"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"max_num_worker": 1}, "max_num_worker"),
        ({"max_num_gpus": "many"}, "max_num_gpus"),
        ({"max_num_gpus": True}, "max_num_gpus"),
        ({"max_num_gpus": -1}, "max_num_gpus"),
        ({"max_num_gpus": 1 << 70}, "max_num_gpus"),
        ({"max_num_gpus": object()}, "max_num_gpus"),
        ({"extent_bytes": 3}, "extent_bytes"),
        ({"max_num_workers": 0, "extent_bytes": 3}, "max_num_workers"),
    ],
)
def test_a_wrong_setting_is_named(config: dict[str, int], key: str) -> None:
    with pytest.raises(errors.ConfigError, match=key) as raised:
        Scheduler(config)
    assert raised.value.key == key


def test_all_wrong_settings_are_reported_at_once() -> None:
    with pytest.raises(errors.ConfigError, match=r"max_num_workers: .*; extent_bytes: "):
        Scheduler({"max_num_workers": 0, "extent_bytes": 3})
