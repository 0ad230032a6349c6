"""The Python front door: `cptool.LLM` and what it gives."""
