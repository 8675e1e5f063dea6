"""What each op means, in plain torch; also the CPU implementation.

Pure functions of tensors: they pack what a rank sends and unpack what it received, and know nothing of processes.
`simulate` puts R ranks of one process together from them, for tests of kernels.
"""
