"""What both schedulers plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Sequences that decode, each behind a prompt of its own.

    The names and numbers are those of `rust/core/benches/step_time.rs`, which builds the same requests.
    """

    num_seqs: int
    prompt_tokens: int
    block_size: int = 16
    num_blocks: int = 200_000
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 4096
    max_model_len: int = 65_536
    max_tokens: int = 2000

    def prompt(self, number: int) -> list[int]:
        """The tokens of one prompt."""
        return [index ^ (number << 16) for index in range(self.prompt_tokens)]
