"""Starts and watches processes: on this machine, under torchrun, or on the nodes of a Ray cluster. Imports neither
torch nor the folder train/.
"""
