"""The command line: a file a subcommand, and beside them what several of them share.

Nothing here imports torch before the arguments are known to be good, so help and mistakes answer at
once.
"""
