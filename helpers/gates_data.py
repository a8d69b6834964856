"""Gates on the data of a run: files, what is left of them after the loader, and the prompts."""

from __future__ import annotations

DATA_GATES = ()
