"""Finds computed blocks by content: a full block's name is the SHA-256 of its parent's name and its token ids."""

from __future__ import annotations

import hashlib
from array import array

from deepserve.request import Request

_INT32 = "i"


def root_hash(cache_salt: str | None) -> bytes:
    """The parent of a first block. Requests share blocks only where their salts are equal (None is a salt too)."""
    return hashlib.sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode()).digest()


def extend_block_hashes(request: Request, num_blocks: int, block_size: int) -> list[bytes]:
    """The request's block hashes, made to cover at least its first `num_blocks` blocks, all full of known tokens."""
    hashes = request.block_hashes
    if len(hashes) < num_blocks:
        token_ids = request.token_ids
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
            block = array(_INT32, token_ids[start : start + block_size])
            parent = hashlib.sha256(parent + block.tobytes()).digest()
            hashes.append(parent)
    return hashes


class PrefixCache:
    """Two maps, block hash <-> block id, of blocks that hold their tokens' entries, in use or free. One id a hash."""

    def __init__(self) -> None:
        self._block_ids: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_ids)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hashes

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks of the longest leading run of `hashes` that is cached."""
        found = []
        for block_hash in hashes:
            block_id = self._block_ids.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(self, block_hash: bytes, block_id: int) -> None:
        """Makes a computed block findable. Where another block has this content already, that one stays the answer."""
        if block_hash not in self._block_ids:
            self._block_ids[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """The block is about to be overwritten."""
        block_hash = self._hashes.pop(block_id, None)
        if block_hash is not None:
            del self._block_ids[block_hash]

    def clear(self) -> None:
        """Forgets every block."""
        self._block_ids.clear()
        self._hashes.clear()
