"""The list of files that could not be read.

- `SkippedLog`: `skipped.jsonl`, one row a file, over all resumes of a run.
"""

from __future__ import annotations

import json
from pathlib import Path


class SkippedLog:
    """Append-only log of {"file", "reason"}, each file once. One process writes it: in a run, rank 0.

    Attributes:
        path: the file; it comes to be with the first row.
        count: files listed, those of earlier runs included.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads what is there. The torn last row that a kill can leave is cut off."""
        self.path = Path(path)
        self._files: set[str] = set()
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for row in whole.splitlines():
            self._files.add(json.loads(row)["file"])

    @property
    def count(self) -> int:
        return len(self._files)

    def add(self, file: str, reason: str) -> bool:
        """List a file. Returns whether it is new."""
        if file in self._files:
            return False
        self._files.add(file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="ascii") as log:  # JSON escapes everything else, stray bytes included
            log.write(json.dumps({"file": file, "reason": reason}) + "\n")
        return True
