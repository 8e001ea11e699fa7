"""Train: one pure step, and one loop that owns the input and output around it.

`make_train_step` builds a pure function that the caller jits, maps over seeds or shards; `fit`
calls it, writes metrics, saves, and goes on where a run was stopped.
"""

from jax_attn.train.checkpoint import UNSAVED, Checkpoints, NotSaved
from jax_attn.train.interrupts import DIVERGED, STOPPED, Diverged, Stopped, stop_requests
from jax_attn.train.leaves import digest
from jax_attn.train.loop import fit
from jax_attn.train.memory import keep_memory
from jax_attn.train.optimizer import average_params, averaged, freeze, scale_rates
from jax_attn.train.run import Run
from jax_attn.train.sinks import Sink as Sink
from jax_attn.train.sinks import tensorboard
from jax_attn.train.step import (
    Guard,
    TrainState,
    bits_per_byte,
    compute_in,
    init_state,
    make_train_step,
    next_token_loss,
)
from jax_attn.train.step import (
    LossFn as LossFn,
)
from jax_attn.train.step import (
    StepFn as StepFn,
)
from jax_attn.train.training import History

__all__ = [
    "DIVERGED",
    "STOPPED",
    "UNSAVED",
    "Checkpoints",
    "Diverged",
    "Guard",
    "History",
    "NotSaved",
    "Run",
    "Stopped",
    "TrainState",
    "average_params",
    "averaged",
    "bits_per_byte",
    "compute_in",
    "digest",
    "fit",
    "freeze",
    "init_state",
    "keep_memory",
    "make_train_step",
    "next_token_loss",
    "scale_rates",
    "stop_requests",
    "tensorboard",
]
