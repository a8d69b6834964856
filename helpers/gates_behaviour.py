"""Gates on what the trained model answers, always beside what its base answers."""

from __future__ import annotations

BEHAVIOUR_GATES = ()
