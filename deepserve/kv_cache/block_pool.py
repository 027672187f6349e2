"""Which blocks are in use, how often, and which free one is taken next. Blocks are plain ints from 0 on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`num_blocks` blocks with reference counts. Free blocks stand in a queue: the longest unused is taken first.

    Every operation is O(1) a block. Freeing or sharing a block that is not in the right state is a RuntimeError: it
    would mean that two requests could write to one block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, those with cached contents included."""
        return len(self._free)

    @property
    def free_blocks(self) -> list[int]:
        """The free blocks, next to be taken first."""
        return list(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, each with one reference from now on. RuntimeError if there are not so many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked, {len(self._free)} of {self.num_blocks} are free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block; a free one leaves the queue with its contents."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self._free[block_id]
            self.ref_counts[block_id] += 1

    def release(self, block_id: int, reusable: bool) -> None:
        """Drops one reference. With the last, the block is free: at the queue's end if its contents may be found again
        (`reusable`), else at its front, so that an empty block is taken before a cached one."""
        count = self.ref_counts[block_id]
        if count == 0:
            raise RuntimeError(f"block {block_id} is freed twice")
        self.ref_counts[block_id] = count - 1
        if count == 1:
            self._free[block_id] = None
            if not reusable:
                self._free.move_to_end(block_id, last=False)
