"""Finds blocks whose tokens were computed before: equal prefixes are computed once.

A full block has a *name*: a hash over the name of the block before it and its own token ids, so
that equal names mean equal text from the beginning on. The first one's parent is the *root* of a
scope, a hash over whatever else must be equal, such as who asks: texts of different scopes never
meet. (Chained block hashes as in vLLM's automatic prefix caching; BLAKE2b, RFC 7693. The roots are
keyed by a secret of the process, so nobody outside can tell any name.)
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from mini_infer_engine.block_pool import BlockPool

_NAME_BYTES = 32


class PrefixCache:
    """Names of blocks, for the blocks that have one.

    A named block is used by sequences or cached by the pool. It loses its name when the pool
    hands it out for something else.
    """

    def __init__(self, pool: BlockPool) -> None:
        """Makes an empty cache over a pool, whose evictions it follows."""
        self._pool = pool
        self._key = secrets.token_bytes(_NAME_BYTES)
        self._blocks: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        """Blocks that have a name."""
        return len(self._blocks)

    def extend_names(
        self, scope: Sequence[str], names: list[bytes], token_ids: Sequence[int], num_blocks: int
    ) -> None:
        """Appends the names of a text's full blocks that are missing.

        Args:
            scope: What must be equal beside the text, part by part.
            names: Those of its first blocks, in order.
            token_ids: The text, 32 bits each.
            num_blocks: How many names there shall be.
        """
        size = self._pool.block_size
        start = len(names)
        if start >= num_blocks:
            return
        ids = array("I", token_ids[start * size : num_blocks * size]).tobytes()
        name = names[-1] if names else self._root(scope)
        step = size * array("I").itemsize
        for offset in range(0, len(ids), step):
            content = name + ids[offset : offset + step]
            name = blake2b(content, digest_size=_NAME_BYTES).digest()
            names.append(name)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix.

        Args:
            names: Of a text's blocks, in order.
        """
        blocks = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, name: bytes, block: int) -> None:
        """Names a used block whose K and V are complete, unless another block has that name."""
        if name not in self._blocks:
            self._blocks[name] = block
            self._names[block] = name
            self._pool.keep(block)

    def remove(self, blocks: Sequence[int]) -> None:
        """Takes the names of blocks away, where they have one: nobody shall find them."""
        for block in blocks:
            if block in self._names:
                self._forget(block)
                self._pool.drop(block)

    def check_integrity(self) -> None:
        """Checks that names and blocks belong together.

        Raises:
            AssertionError: Where they do not.
        """
        assert self._blocks == {name: block for block, name in self._names.items()}
        assert len(self._blocks) == len(self._names)
        kept = {block for block in range(self._pool.num_blocks) if self._pool.is_kept(block)}
        assert kept == self._names.keys(), "blocks are kept that have no name, or named and not"

    def _root(self, scope: Sequence[str]) -> bytes:
        parts = [part.encode("utf-8", "surrogatepass") for part in scope]
        content = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return blake2b(content, key=self._key, digest_size=_NAME_BYTES, person=b"scope").digest()

    def _forget(self, block: int) -> None:
        del self._blocks[self._names.pop(block)]
