"""NSRU unlearning: data, trainer, evaluation, command line and report."""
