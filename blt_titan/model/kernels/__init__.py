"""Operations between bytes and the patches that hold them, which are runs of byte slots.

Each is an operator of torch (`torch.ops.blt`): Triton on CUDA, plain PyTorch on the CPU, one node to `torch.compile`,
with shapes for FakeTensor and a backward. All are deterministic: what a patch sums lies side by side, so that nothing
is added atomically. A kernel's twin is the CPU implementation in the file beside it.
"""
