"""Evaluation by lm-evaluation-harness, which is optional: `pip install 'cptool[eval]'`."""
