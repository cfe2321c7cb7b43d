"""Fast kernels for a CPU: Qwen3's decoder layer in vectors, on all cores.

tinygrad lowers the model to code for one core that converts half precision and integers one number
at a time. Here the same steps are a short C program in clang's vector extensions (x86 and Arm
alike), compiled by the device's own compiler and called from tinygrad's graph. Weights stay as the
file stores them and are decoded in registers. The model runs without this package: `load` returns
None, with the reason, where the program cannot be compiled or started.

    threads.c     one pool of threads a process
    vectors.c     vectors of eight, exponentials
    types.c       what stored weights mean
    products.c    one position, or many, times a matrix
    attention.c   over the cache, one position or many
    steps.c       a kernel is a list of such steps

Knows nothing of checkpoints, text or sampling; imports tinygrad and numpy.
"""

from qwen3_tg_cpu.kernels import MOST_ALIKE, AttentionWeights, Kernels, Matrix, MLPWeights, load

__all__ = ["MOST_ALIKE", "AttentionWeights", "Kernels", "MLPWeights", "Matrix", "load"]
