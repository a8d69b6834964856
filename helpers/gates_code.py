"""Gates on what the run recorded and on the code: records, weights, self-tests of the pipeline."""

from __future__ import annotations

RUN_GATES = ()
CODE_GATES = ()
