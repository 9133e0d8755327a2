"""Training the mini models from scratch on the mini world.

:func:`popi.pretraining.pretrain.run` runs a recipe with ``task: pretrain``. ``lessons`` turns training sequences into
batches and losses, ``learner`` does one step, and ``probes`` measures a model on held-out users.
"""
