"""From a laptop to a TPU slice and back: plan, tune, run, check. See tpu/README.md."""
