"""Evaluation: preference accuracy, win rate and faithfulness of summaries, with controls and confidence intervals.

A table has rows, what the generator reads about a user (:mod:`~popi.evaluation.rows`), and columns, the generators.
:func:`popi.evaluation.run.evaluate` measures each cell user by user and keeps the measurements in a folder
(:mod:`~popi.evaluation.measure`, :mod:`~popi.evaluation.folder`). :mod:`~popi.evaluation.tabulate` computes the figures
from them, with a bootstrap over users (:mod:`~popi.evaluation.statistics`), and :mod:`~popi.evaluation.report` formats
them.
"""
