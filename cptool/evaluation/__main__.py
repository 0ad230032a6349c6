"""`python -m cptool.evaluation`: the command line of lm-evaluation-harness with the model `cptool`.

The harness knows the models of its own package and those of modules that have been imported, and
has no option that imports one.
"""

import sys

from cptool.errors import RunError, UserError, as_options


def main() -> None:
    """Run the harness's command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        line = "lm-evaluation-harness is not installed; install it with pip install 'cptool[eval]'"
        sys.exit(f"cptool: {line}")
    from cptool.evaluation import harness  # noqa: F401

    try:
        cli_evaluate()
    except (UserError, RunError) as error:
        print(f"cptool: {as_options(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
