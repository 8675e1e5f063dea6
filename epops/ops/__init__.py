"""The ops: public functions, their real kernels over a group's transport, and their gradients."""
