"""What a forward must compute and move, and how long that takes on given hardware.

`counts` are exact numbers of operations and bytes. `layer` predicts one decoder layer on the
busiest rank and `exchange` the attention in it, variant by variant; `estimate` combines layers,
embedding, logits and overheads into the time to the first token and between tokens; `memory`
states what a rank must hold. All of it is arithmetic on a `HardwareProfile`; no torch.
"""
