"""The measurements of `cptool bench` and of the scripts under benchmarks/."""
