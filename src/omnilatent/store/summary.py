"""What people see of a store without opening its shards.

- `summarise`: the summary in `store.json`, and `skipped.jsonl`, from what is committed.
- `is_summarised`: whether they are up to date.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .description import read_description, write_summary
from .files import replace_text
from .index import Index, read_index
from .shards import index_file, shard_numbers


def summarise(folder: Path) -> Index:
    """Bring `store.json` and `skipped.jsonl` up to date. Any number of writers may do so; the last one is right.

    Returns:
        The index of what is committed.
    """
    while True:
        state = _state(folder)
        index = read_index(folder, read_description(folder))
        moments = {name: {"mean": m.mean.tolist(), "std": m.std.tolist()} for name, m in index.moments.items()}
        _list_skipped(folder, index)  # first: the summary says that all is done
        write_summary(folder, {"rows": len(index), "contents": index.contents, "skipped": len(index.skipped),
                               "shards": len(index.groups), "bytes": index.bytes, "moments": moments,
                               "data": index.data, "state": state})
        if _state(folder) == state:  # or another writer has come to its end meanwhile
            return index


def is_summarised(folder: Path) -> bool:
    """Whether the summary is of all shards that are there."""
    return read_description(folder).summary.get("state") == _state(folder)


def _state(folder: Path) -> str:
    """16 hex digits that differ for any other set of committed shards: over number, size and time of every index. A
    count would not tell that a shard was removed and another written since."""
    stamps = [(number, *_stamp(index_file(folder, number))) for number in shard_numbers(folder)]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _list_skipped(folder: Path, index: Index) -> None:
    """`skipped.jsonl` as every command writes it; the index is what counts."""
    rows = [json.dumps({"file": key, "reason": index.skipped[key].reason}) for key in sorted(index.skipped)]
    if rows:
        replace_text(folder / "skipped.jsonl", "\n".join(rows) + "\n")
    else:
        (folder / "skipped.jsonl").unlink(missing_ok=True)
