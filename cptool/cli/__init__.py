"""The command line: one file a subcommand, one for the options they share, one for what they draw.

Nothing here imports torch before the arguments are known to be good, so help and mistakes answer at
once.
"""
