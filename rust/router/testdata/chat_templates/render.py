"""Writes `expected` into cases.json: what transformers renders. Needs `pip install transformers`.

Run it after changing a template or a case: `python rust/router/testdata/chat_templates/render.py`.
"""

import datetime
import json
from pathlib import Path

from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|eot_id|>"}


class FixedDate(datetime.datetime):
    """The day that the Rust test renders on."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        """29 February 2024."""
        return datetime.datetime(2024, 2, 29, 12, 34, 56, tzinfo=tz)


def main() -> None:
    """Renders every case."""
    chat_template_utils.datetime = FixedDate
    path = HERE / "cases.json"
    cases = json.loads(path.read_text())
    for case in cases:
        source = (HERE / f"{case['template']}.jinja").read_text()
        rendered, _ = chat_template_utils.render_jinja_template(
            [case["messages"]],
            tools=case.get("tools"),
            chat_template=source,
            add_generation_prompt=True,
            **SPECIAL_TOKENS,
            **case.get("template_kwargs", {}),
        )
        case["expected"] = rendered[0]
    path.write_text(json.dumps(cases, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
