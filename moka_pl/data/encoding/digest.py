"""Hashes of training data, by which a resumed run knows them again."""

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import Dataset

    from moka_pl.data.sources import Shard

_ROWS = 10_000
_ENDS = 1 << 16


def rows_digest(rows: "Dataset") -> str:
    """Returns a hash of the content of encoded rows, wherever they are stored."""
    digest = blake2b(digest_size=8)
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            _update(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def sources_digest(shards: Iterable["Shard"]) -> str:
    """Returns a hash of streamed corpora: size and both ends of files, names of hub datasets."""
    digest = blake2b(digest_size=8)
    for shard in shards:
        path = expanded(shard.source)
        if not path.is_file():
            digest.update(json.dumps([str(shard.source), shard.split, shard.options], default=str).encode())
            continue
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:
    import pyarrow  # type: ignore[import-untyped]

    if isinstance(array, pyarrow.ListArray) and array.null_count == 0:
        digest.update(array.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        _update(digest, array.flatten())
    elif pyarrow.types.is_primitive(array.type) and array.null_count == 0:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), default=str).encode())
