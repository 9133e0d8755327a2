"""Measuring what a summary is worth: preference accuracy, win rate, faithfulness, with controls and intervals.

A table has rows, what the generator is told of a user (:mod:`~popi.evaluation.rows`), and columns, the generators.
:func:`popi.evaluation.run.evaluate` measures each cell user by user and keeps what it measured in a folder
(:mod:`~popi.evaluation.measure`, :mod:`~popi.evaluation.folder`); :func:`popi.evaluation.results.tabulate` turns the
measurements into figures with a bootstrap over users (:mod:`~popi.evaluation.statistics`), and
:mod:`~popi.evaluation.report` writes them down.
"""
