"""What `cptool bench` and the scripts under benchmarks/ measure, and how."""
