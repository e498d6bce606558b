"""The parts of the demonstration model's training, in reading order.

`corpus` turns the text into tokens and windows, `llama` is the network, `training` the loop and the
two losses, `evaluation` the figures, `export` the files that a server loads.
"""
