"""Numbers of teacher tokens that an engine gets at once, by default for the device that it computes on.

A GPU's steps are larger, and several of them are queued, so that the engine does not wait for the host between them.
"""

from pipeline.config import PlacementConfig
from pipeline.runtime.devices import computes_on_gpu

STEP_TOKENS_CPU, STEP_TOKENS_GPU = 2_048, 8_192
CALL_TOKENS_CPU, CALL_TOKENS_GPU = 8_192, 65_536


def step_tokens(placement: PlacementConfig) -> int:
    """Return the maximum number of tokens in one step of an engine."""
    return placement.engine_batch_tokens or (STEP_TOKENS_GPU if computes_on_gpu() else STEP_TOKENS_CPU)


def call_tokens(placement: PlacementConfig) -> int:
    """Return the number of tokens that are passed to an engine at once."""
    return placement.batch_tokens or (CALL_TOKENS_GPU if computes_on_gpu() else CALL_TOKENS_CPU)
