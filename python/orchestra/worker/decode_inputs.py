"""The arrays of a decode step at addresses that never change, for kernels that were recorded with them."""

import torch
from torch import Tensor

from orchestra.worker.plan import StepPlan
from orchestra.worker.staging import StagingRing, aligned

# Of a row that pads: its KV is written nowhere, and it sees nothing.
NO_SLOT, NO_CONTEXT = -1, 0


class DecodeInputs:
    """What a step of up to `max_size` sequences of one token each reads, all `int32`, in one allocation.

    Args:
        max_size: most sequences.
        max_blocks: of the longest sequence.
        device: where they lie.
    """

    def __init__(self, max_size: int, max_blocks: int, device: torch.device) -> None:
        row = aligned(max_size)
        self._row, self._max_size = row, max_size
        self._ring = StagingRing(device)
        self._memory = torch.zeros(
            5 * row + max_size * max_blocks, dtype=torch.int32, device=device
        )
        pieces = [self._memory[index * row : index * row + max_size] for index in range(5)]
        self.token_ids: Tensor = pieces[0]
        """`[max_size]`"""
        self.positions: Tensor = pieces[1]
        """`[max_size]`"""
        self.slots: Tensor = pieces[2]
        """`[max_size]`; see `StepPlan.slot_mapping`."""
        self.context_lens: Tensor = pieces[3]
        """`[max_size]`"""
        self.table_width: Tensor = pieces[4][:1]
        """`[1]`, columns of the tables: those of this step."""
        self.block_tables: Tensor = self._memory[5 * row :]
        """The tables, row after row."""
        self.clear()

    def clear(self) -> None:
        """All rows pad."""
        self.slots.fill_(NO_SLOT)
        self.context_lens.fill_(NO_CONTEXT)

    def fill(self, plan: StepPlan) -> None:
        """Takes a step's arrays, in one copy that is not waited for. The rows behind its sequences pad."""
        row = self._row
        count, width = plan.block_tables.shape
        length = 5 * row + count * width
        assert count <= self._max_size
        assert length <= len(self._memory)
        host = self._ring.take(length)
        host[: 5 * row] = 0
        host[2 * row : 3 * row] = NO_SLOT
        arrays = (plan.token_ids, plan.positions, plan.slot_mapping, plan.context_lens)
        for index, array in enumerate(arrays):
            host[index * row : index * row + count] = array
        host[4 * row] = width
        host[5 * row :] = plan.block_tables.reshape(-1)
        self._ring.send(self._memory[:length])
